"""Settings of a run: strict Pydantic models, read from YAML, changed by ``key=value`` on the command line.

An unknown key is an error that names the nearest right one.  No file inherits from another and no value names code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Base of all settings: frozen; unknown keys, NaN and infinity refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Settings)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-4`` is a number, ``on``/``no`` are words and ``010`` is ten."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":float", ":int", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:hrsam,int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:hrsam,float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _number(kind: type) -> Any:
    return lambda loader, node: kind(str(loader.construct_scalar(node)).replace("_", ""))


_Loader.add_constructor("tag:hrsam,int", _number(int))
_Loader.add_constructor("tag:hrsam,float", _number(float))


def read_settings(kind: type[SettingsT], path: str | Path, overrides: Sequence[str] = ()) -> SettingsT:
    """Read ``path`` (YAML) as ``kind``, then apply ``overrides`` such as ``"phases.0.steps=10"``.

    Raises ``ValueError`` with one line for each thing that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no settings file {path}; give the path of a YAML file, for instance one of configs/"
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(err).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines; got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as err:
        raise ValueError(f"{path}: " + "; ".join(_explain(kind, problem) for problem in err.errors())) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override is key=value; got {override!r}")
    *parents, last = key.split(".")
    place: Any = values
    try:
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[int(last) if isinstance(place, list) else last] = yaml.load(text, Loader=_Loader)
    except (IndexError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        raise ValueError(f"cannot set {key!r}: there is no such place in the settings file") from None


def _explain(kind: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{where}: this setting has no default; give it a value"
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg'].lower()}, got {problem['input']!r}"
    names = _names_at(kind, problem["loc"][:-1])
    near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(names))}"
    return f"{where}: no such setting; {hint}"


def _names_at(kind: Any, location: Sequence[Any]) -> list[str]:
    """Field names of the settings model at a place of ``kind``, for suggestions."""
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return []
        kind = field.annotation
        while not hasattr(kind, "model_fields") and get_args(kind):
            kind = get_args(kind)[0]
    return list(getattr(kind, "model_fields", {}))
