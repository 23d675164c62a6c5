"""YAML files and ``--set`` overrides into dataclasses, strictly, and back into YAML.

Strict means: an unknown key, a repeated key or a value of another type is an error of one line that names the key's
path (``attention.block_size``), and nothing is guessed. One exception: ``1e-3``, which YAML 1.1 reads as text, is
accepted where a number is expected.
"""

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist = 3, 4, 6
_LARGEST = 2**63 - 1


def load(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` into the dataclass ``cls``; ``overrides`` are texts such as ``"model.layers=8"``.

    Where no such file exists, ``path`` may name a config that comes with the library (:func:`packaged_configs`), with
    or without ``configs/`` and ``.yaml``.

    Raises:
        ValueError: the file is not there or no valid YAML, or a key or value is wrong.
        OSError: the file is there and cannot be read.
    """
    packaged = packaged_configs()
    file = Path(path)
    if not file.exists():
        name = file.as_posix().removeprefix("configs/").removesuffix(".yaml")
        file = packaged.get(name, file)
    if file.exists() and not (file.is_file() or file.is_dir()):
        # Reading a pipe could block forever, and every rank reads the file.
        raise ValueError(f"{path}: is a pipe or a device; give a YAML file or one of {', '.join(packaged)}")
    try:
        # The loader is YAML's safe one.
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506  # nosec B506
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "is a folder" if isinstance(error, IsADirectoryError) else "no such file"
        raise ValueError(f"{path}: {what}; give a YAML file or one of {', '.join(packaged)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; a config has sections, keys and lists") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        # A number of thousands of digits, a date that is none.
        raise ValueError(f"{path}: {error}") from None
    values = {} if values is None else values
    for text in overrides:
        override(cls, values, text)
    return build(cls, values)


def packaged_configs() -> dict[str, Path]:
    """The configs that come with the library: name (``demo``, ``hybrid/switch_90_10``) -> file."""
    package = Path(str(resources.files("moba_cp")))
    # An installed package holds them; in a checkout they stand beside it.
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def build(cls: type[Config], values: Any, path: str = "") -> Config:
    """``values``, as YAML gives them, into the dataclass ``cls``; ``path`` is where they stand in the file."""
    if not isinstance(values, dict):
        raise ValueError(f"{path or 'config'}={_show(values)}: expected keys and values, such as {_example(cls)}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in values:
        if key not in names:
            raise ValueError(f"{_join(path, key)}: unknown key; {_suggest(str(key), names)}")
    for field in dataclasses.fields(cls):
        if field.init and field.name not in values and _required(field):
            raise ValueError(f"{_join(path, field.name)}: missing; it has no default")
    arguments = {key: _convert(value, hints[key], _join(path, key)) for key, value in values.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        # The path says the section already.
        section = path.rpartition(".")[2]
        text = str(error).removeprefix(section + " ").removeprefix(section + ".")
        # Our dataclasses say "name=value rule": put the section's path before the name.
        names_field = any(text.startswith((name + "=", name + ".", name + ":", name + "[")) for name in names)
        joint = "" if not path else "." if names_field else ": "
        raise ValueError(f"{path}{joint}{text}") from None


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that :func:`load` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists of YAML's own types."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            if isinstance(key, (str, int, float, bool)):
                seen.add(key)
        return super().construct_mapping(node, deep)


def override(cls: type, values: Any, override: str) -> None:
    """Put what a text such as ``model.layers=8`` says into the nested dicts ``values`` of a config ``cls``."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {override}: expected SECTION.KEY=VALUE, such as --set attention.top_k=4")
    value = _parse_override(text, _members(cls, keys), override)
    for depth, key in enumerate(keys):
        if not isinstance(values, dict):
            place = ".".join(keys[:depth]) or "the file"
            raise ValueError(f"--set {override}: {place} is {_show(values)} and has no keys")
        if depth == len(keys) - 1:
            values[key] = value
        elif values.get(key) is None:
            values[key] = {}
        values = values[key]


def _parse_override(text: str, members: set[Any], override: str) -> Any:
    """The value in ``override``. For a key that takes only text it is what was typed, ``*.txt``, ``2024`` and ``a # b``
    included, but for null and for quotes; else it is YAML, or, where the key takes text too, what YAML cannot read."""
    typed = text.strip()
    if members <= {str, type(None)} and str in members and typed[:1] not in ("'", '"'):
        return None if typed in ("", "~", "null") else typed
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  # nosec B506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if str in members:
            return typed
        why = _one_line(error) if isinstance(error, yaml.YAMLError) else _show(str(error))
        raise ValueError(f"--set {override[:80]}: {why}") from None


def _members(cls: type, keys: Sequence[str]) -> set[Any]:
    """The types that the field ``keys`` of ``cls`` takes, members of a union one by one; none if there is no such."""
    hint: Any = cls
    for key in keys:
        sections = [member for member in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(member)]
        hint = typing.get_type_hints(sections[0]).get(key) if sections else None
    return set(typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,))


def _convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the type ``hint``, or ValueError. Unions take the first member that fits."""
    if type(value) is int and abs(value) > _LARGEST:
        raise ValueError(f"{path}={_show(value)}: beyond 2**63; give a smaller number")
    if type(value) is str and "\0" in value:
        raise ValueError(f"{path}={_show(value)}: holds a zero byte; leave it out")
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        sections = [member for member in arguments if dataclasses.is_dataclass(member)]
        if sections and isinstance(value, dict):
            return build(sections[0], value, path)
        for member in arguments:
            if not dataclasses.is_dataclass(member):
                try:
                    return _convert(value, member, path)
                except ValueError:
                    continue
    elif origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        if isinstance(value, str):
            known = [str(choice) for choice in arguments]
            suggestion = _suggest(value, known)
            those = "" if suggestion.startswith("expected") else f" Expected one of {', '.join(known)}"
            raise ValueError(f"{path}={_show(value)}: {suggestion}{those}")
    elif origin in (tuple, list):
        if isinstance(value, (list, tuple)):
            fixed = origin is tuple and Ellipsis not in arguments
            if not fixed or len(value) == len(arguments):
                members = arguments if fixed else [arguments[0]] * len(value)
                return origin(_convert(v, m, f"{path}[{i}]") for i, (v, m) in enumerate(zip(value, members)))
    elif hint is float:
        number = _number(value)
        if number is not None:
            return number
    elif hint in (int, bool, str, type(None)):
        if type(value) is hint:
            return value
    else:
        raise TypeError(f"{path}: fields of type {hint} cannot be read from YAML")
    raise ValueError(f"{path}={_show(value)}: expected {_describe(hint)}, not {_describe(type(value), value)}")


def _number(value: Any) -> float | None:
    """A finite float from a YAML number or from text such as 1e-3; None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _describe(hint: Any, value: Any = None) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (tuple, list):
        fixed = origin is tuple and Ellipsis not in arguments
        return f"a list of {len(arguments)} values" if fixed else f"a list, each {_describe(arguments[0])}"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan or infinity"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    names |= {list: "a list", tuple: "a list", dict: "keys and values"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    # "blocksize" and "block_size" differ by less than difflib's ratio suggests for short names.
    near = near or [k for k in known if k.replace("_", "") == name.lower().replace("_", "").replace("-", "")]
    return f"did you mean {near[0]}?" if near else "expected one of " + ", ".join(known)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return value


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _example(cls: type) -> str:
    return f"{{{dataclasses.fields(cls)[0].name}: ...}}"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: Any) -> str:
    # YAML's aliases make values of a few lines that are endless when written out, and digits without end are refused.
    text = repr(value) if isinstance(value, str) else _BRIEF.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
    if "alias" in (getattr(error, "context", None) or "") or "undefined alias" in problem:
        problem += "; put quotes around text that begins with *"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
