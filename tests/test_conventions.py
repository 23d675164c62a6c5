"""What every file keeps to, read from its syntax."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = sorted(path for room in ("kernels", "launchers", "moba_cp") for path in (ROOT / room).rglob("*.py"))
# torch.arange is not among these: of whole numbers it makes int64, whatever the default dtype is.
FACTORIES = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}


def calls(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_tensors_are_made_with_a_dtype():
    """A default dtype of float16 or float64 must change nothing."""
    for path in SOURCES:
        for call in calls(ast.parse(path.read_text())):
            if isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES:
                is_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
                # A ``None`` keyword is ``**options``.
                says = {keyword.arg for keyword in call.keywords} & {"dtype", None}
                assert not is_torch or says, f"{named(path)}:{call.lineno}: torch.{call.func.attr} without dtype="


def test_copies_to_a_device_wait_for_nothing():
    """``x.to(device, non_blocking=True)`` does where x is not page-locked; :func:`moba_cp.host.to_device` never."""
    for path in SOURCES:
        for call in calls(ast.parse(path.read_text())):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "to":
                blocks = "non_blocking" in {keyword.arg for keyword in call.keywords}
                locked = ast.unparse(call.func.value).endswith(".pin_memory()")
                assert not blocks or locked, f"{named(path)}:{call.lineno}: use moba_cp.host.to_device"


def dotted(node: ast.AST) -> list[str] | None:
    """The names of ``a.b.c``; None of what is no such chain."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def imported(tree: ast.AST) -> dict[str, str]:
    """Modules of PyTorch that a file imports whole: the name there -> the module's own."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or "torch": a.name if a.asname else "torch" for a in node.names if is_torch(a.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and is_torch(node.module):
            for a in node.names:
                try:
                    importlib.import_module(f"{node.module}.{a.name}")
                except ModuleNotFoundError:
                    continue
                names[a.asname or a.name] = f"{node.module}.{a.name}"
    return names


def is_torch(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "torch"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_what_is_called_of_torch_exists(path):
    """Much of it is called on a GPU alone, where a misspelt name would be seen too late."""
    tree = ast.parse(path.read_text())
    modules = imported(tree)
    for node in ast.walk(tree):
        chain = dotted(node)
        if chain is None or chain[0] not in modules:
            continue
        value = importlib.import_module(modules[chain[0]])
        for i, name in enumerate(chain[1:], start=1):
            where = f"{named(path)}:{node.lineno}: no {'.'.join(chain[: i + 1])} in this PyTorch"
            if not hasattr(value, name):
                try:
                    importlib.import_module(f"{value.__name__}.{name}")
                except (AttributeError, ModuleNotFoundError):
                    pytest.fail(where)
            value = getattr(value, name)
            if value is None:
                break  # torch.version.cuda, in a build for CPUs


def test_files_are_short_enough_to_read():
    long = {named(path): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 420}
    assert not long, f"files of more than 420 lines: {long}"


@pytest.mark.parametrize("path", KERNELS, ids=named)
def test_launches_are_guarded_and_say_what_they_want(path):
    """The device of the tensors may not be the current one, and defaults change with Triton's version."""
    tree = ast.parse(path.read_text())
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and "on_device(" in ast.unparse(node.items[0]):
            guarded |= {id(call) for call in calls(node)}
    for call in calls(tree):
        if not (isinstance(call.func, ast.Subscript) and "kernel" in ast.unparse(call.func.value)):
            continue
        where = f"{named(path)}:{call.lineno}"
        # Those of kernels/hopper are in functions that are called within the guard.
        assert id(call) in guarded or path.parent.name == "hopper", f"{where}: a launch outside on_device"
        options = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
        said = any(option.startswith("launch_options(") for option in options)
        assert said, f"{where}: a launch without launch_options"
