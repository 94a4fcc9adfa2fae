"""Reading parameters: params.yaml, a profile's differences, overrides and seeds, and one message for what is wrong.

Not for what the parameters are: config.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from bitdistill_core.config import Params, Section
from bitdistill_core.errors import one_line

SectionType = TypeVar("SectionType", bound=Section)


def load_params(
    path: Path,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    data_root: str | None = None,
) -> Params:
    """The validated parameters: params.yaml, then profiles/PROFILE.yaml beside it, then `section.key=value` overrides.

    Args:
        path: params.yaml.
        profile: a file name in `profiles/` without its ending; None and "demo" are params.yaml alone.
        overrides: `section.key=value`, value in YAML.
        seed: replaces every key `seed`.
        data_root: replaces data.data_root.
    Raises:
        ValueError: an unreadable file, an unknown profile or key, a wrong type; the message names the key.
    """
    values = read_yaml(path)
    if profile is not None and profile != "demo":
        values = merged(values, read_yaml(_profile_path(path, profile)))
    for override in overrides:
        _apply_override(values, override)
    if seed is not None:
        _set_seeds(values, seed)
    if data_root is not None:
        _apply_override(values, f"data.data_root={json.dumps(data_root, ensure_ascii=False)}")
    return validated(Params, values)


def validated(model: type[SectionType], values: Mapping[str, Any]) -> SectionType:
    """`values` as that model. Raises ValueError that names every wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ValueError(_one_message(error)) from None


def run_name(profile: str, *, seed: int | None, name: str | None) -> str:
    """Name of a run: `name`, else the profile, with -seedN when a seed was given."""
    if name is not None:
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"the name of a run must be one directory name; got name={name!r}")
        return name
    return profile if seed is None else f"{profile}-seed{seed}"


def list_profiles(path: Path) -> list[str]:
    """The profile names beside params.yaml, demo first."""
    return ["demo", *sorted(p.stem for p in (path.parent / "profiles").glob("*.yaml"))]


def _profile_path(path: Path, profile: str) -> Path:
    if profile not in list_profiles(path):
        raise ValueError(f"unknown profile={profile}; the profiles are {', '.join(list_profiles(path))}")
    return path.parent / "profiles" / f"{profile}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of sections. Raises ValueError when there is none or it is something else."""
    if not path.is_file():
        raise ValueError(f"no parameter file at path={path}; run from the project's root or give its path")
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text())
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"parameter file path={path} is not YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"parameter file path={path} must hold sections; got {type(values).__name__}")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the leaves of `changes`. Mappings merge, anything else replaces."""
    out = dict(values)
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merged(out[key], change)
        else:
            out[key] = change
    return out


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2:
        raise ValueError(f"an override reads section.key=value; got {override!r}")
    node = values
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            raise ValueError(f"unknown key in override {override!r}: {key}; the keys are {', '.join(node)}")
        node = node[key]
    if keys[-1] not in node:
        raise ValueError(f"unknown key in override {override!r}: {keys[-1]}; the keys are {', '.join(node)}")
    try:
        node[keys[-1]] = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise ValueError(f"the value of override {override!r} is not YAML") from None


def _set_seeds(values: dict[str, Any], seed: int) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _set_seeds(value, seed)
        elif key == "seed":
            values[key] = seed


def _one_message(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        got = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
        text = {"extra_forbidden": "unknown key", "missing": "missing key"}.get(item["type"], item["msg"])
        parts.append(f"{where}: {text.removeprefix('Value error, ')}{got}")
    return "invalid parameters: " + "; ".join(parts)
