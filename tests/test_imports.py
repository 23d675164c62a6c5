"""Imports go one way, from the rooms on top to those below, and never in a circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from its own room and from those before it.
ROOMS = [
    "kernels", "launchers", "outputs", "config", "host", "blocks", "given", "dtypes", "transforms", "reference",
    "eager", "ops", "dense", "autograd", "cp", "attention", "cache", "steps", "index", "passes", "model", "data",
    "megatron", "hf", "train", "experiments", "bench", "doctor", "verify", "cli", "__main__",
]  # fmt: skip


def _modules() -> dict[str, Path]:
    """Name -> file, the package's own ``__init__`` left out: it names what users import and imports it lazily."""
    found = {}
    for top, name in (("moba_cp", ()), ("kernels", ("kernels",)), ("launchers", ("launchers",))):
        for path in (ROOT / top).rglob("*.py"):
            parts = ("moba_cp", *name, *path.relative_to(ROOT / top).with_suffix("").parts)
            # In an editable checkout links to kernels/ and launchers/ may stand inside moba_cp/.
            if not path.parent.is_symlink():
                found[".".join(part for part in parts if part != "__init__")] = path
    del found["moba_cp"]
    return found


MODULES = _modules()


def _imports(module: str) -> set[str]:
    """The project's modules that ``module`` imports, within functions too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
            targets |= {name if name in MODULES else origin for name in names}
        elif isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
    # A package's __init__ runs before each of its modules, and names what they define.
    return {target for target in targets if target in MODULES and not module.startswith(target + ".")}


def _room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


def test_every_room_has_its_place():
    assert {module.split(".")[1] for module in MODULES} <= set(ROOMS)


def test_no_arrow_upward():
    upward = [
        f"{module} imports {target}"
        for module in MODULES
        for target in _imports(module)
        if _room(target) > _room(module)
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_circle():
    """Modules are taken away once all that they import has been; what remains stands in a circle."""
    waiting = {module: _imports(module) for module in MODULES}
    while free := [module for module, targets in waiting.items() if not targets & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, sorted(waiting)
