"""Parameters as MLflow shows them: flat `section.key` names, nothing private in the values."""

import re
from collections.abc import Container, Mapping
from pathlib import Path
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


def without_private(text: str) -> str:
    """`text` without credentials in addresses, and an absolute path without the directories that lead to it.

    A path below the current directory becomes relative to it.
    """
    text = re.sub(r"://[^/@\s]+@", "://", text)
    if text.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", text):
        path = Path(text)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else f".../{path.name}"
    return text
