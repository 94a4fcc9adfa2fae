"""Parameters as MLflow shows them: flat `section.key` names."""

from collections.abc import Container, Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "", *, whole: Container[str] = ()) -> dict[str, Any]:
    """Nested mappings as `section.key`, those named in `whole` as one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in whole:
            flat.update(flatten(value, f"{prefix}{key}.", whole=whole))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
