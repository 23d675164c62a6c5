"""Every key of a training config with its type, default and meaning, read from the source of the dataclasses.

From the source, not from the classes: these stand beside the code that uses them, which takes seconds to import.
"""

import ast
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_NAMES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "None": "null"}


@dataclass(frozen=True)
class Key:
    """A key of the YAML file, or a section of keys."""

    path: str
    """Such as ``attention.block_size``; ``data.corpora[].path`` for a key of each entry of a list."""
    type: str
    default: str
    """As YAML has it; empty for a section, ``required`` where there is none."""
    meaning: str
    is_section: bool = False


def all_keys() -> list[Key]:
    """The keys of all sections, in the order of the dataclasses."""
    return _keys_of("TrainConfig", _PACKAGE / "train" / "config.py", "")


def as_text(keys: list[Key]) -> str:
    """For the terminal."""
    lines = []
    for key in keys:
        if key.is_section:
            lines.append(f"\n{key.path}: {key.meaning}")
        else:
            lines.append(f"  {key.path} = {key.default}    ({key.type})")
            lines.append(textwrap.indent(textwrap.fill(key.meaning.replace("``", ""), 100), " " * 6))
    return "\n".join(lines).strip()


def as_markdown(keys: list[Key]) -> str:
    """docs/config.md."""
    lines = [
        "# Every key of a training config",
        "",
        "`moba-cp config` prints this table and `moba-cp config CONFIG --set ...` a file with all that it leaves out;",
        "`moba-cp config --markdown` wrote this page from the dataclasses. A key is set by `--set SECTION.KEY=VALUE`.",
    ]
    for key in keys:
        if key.is_section:
            lines += ["", f"## {key.path}", "", key.meaning, ""]
            lines += ["| key | default | type | meaning |", "|---|---|---|---|"]
        else:
            cells = (f"`{key.path}`", f"`{key.default}`", key.type, key.meaning.replace("``", "`"))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _keys_of(name: str, file: Path, prefix: str) -> list[Key]:
    body, keys = _class(name, file).body, []
    for field, behind in zip(body, [*body[1:], None]):
        if not isinstance(field, ast.AnnAssign):
            continue
        path = prefix + field.target.id
        meaning = " ".join(_text(behind).split())
        found = _dataclass_in(field.annotation, file)
        if found is None:
            keys.append(Key(path, _type(field.annotation, file), _default(field.value), meaning))
            continue
        nested, where, is_list = found
        if prefix or is_list:
            # A section within a section: null or a list by default.
            keys.append(Key(path, "a list" if is_list else "null, or these keys", _default(field.value), meaning))
        else:
            keys.append(Key(path, "", "", meaning, is_section=True))
        keys += _keys_of(nested, where, f"{path}{'[]' if is_list else ''}.")
    return keys


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    if isinstance(value, ast.Call) or not isinstance(value, (ast.Constant, ast.Tuple, ast.UnaryOp)):
        return ast.unparse(value)
    default = ast.literal_eval(value)
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "[]" if default == () else str(default)


def _type(annotation: ast.expr, file: Path) -> str:
    if isinstance(annotation, ast.BinOp):
        return " or ".join((_type(annotation.left, file), _type(annotation.right, file)))
    if isinstance(annotation, ast.Subscript):
        inside = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if ast.unparse(annotation.value) == "Literal":
            return "one of " + ", ".join(f"`{ast.literal_eval(x)}`" for x in inside)
        return f"list, each {_type(inside[0], file)}"
    text = ast.unparse(annotation)
    if text in _NAMES:
        return _NAMES[text]
    defined = _assigned(text, file)
    return _type(*defined) if defined is not None else text


def _dataclass_in(annotation: ast.expr, file: Path) -> tuple[str, Path, bool] | None:
    """The dataclass that an annotation names, its file, and whether it is a list of such; None if it names none."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and (where := _defining_file(node.id, file)) is not None:
            if any(isinstance(x, ast.ClassDef) and x.name == node.id for x in _parsed(where).body):
                return node.id, where, any(isinstance(x, ast.Subscript) for x in ast.walk(annotation))
    return None


def _assigned(name: str, file: Path) -> tuple[ast.expr, Path] | None:
    """What a module assigns to ``name``, such as ``Layout = Literal[...]``, and in which file."""
    where = _defining_file(name, file)
    for node in _parsed(where).body if where is not None else ():
        if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == name for x in node.targets):
            return node.value, where
    return None


def _defining_file(name: str, file: Path) -> Path | None:
    """The file of the package in which ``name``, as ``file`` sees it, is defined."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ImportFrom) and node.level and any(x.name == name for x in node.names):
            base = file.parents[node.level - 1]
            return base.joinpath(*node.module.split(".")).with_suffix(".py")
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file
        if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == name for x in node.targets):
            return file
    return None


def _class(name: str, file: Path) -> ast.ClassDef:
    return next(node for node in _parsed(file).body if isinstance(node, ast.ClassDef) and node.name == name)


def _text(node: ast.stmt | None) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return node.value.value if is_text else ""


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
