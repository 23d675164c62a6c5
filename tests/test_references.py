"""What docstrings, comments and documents refer to is there."""

import ast
import re

from tests.test_imports import MODULES, ROOT

ROLE = re.compile(r":(?:mod|func|class|data|meth|attr):`~?([.\w]+)`")
# Names that a package finds when they are asked for.
LAZY = {"_MODULES", "_LAZY"}


def _names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Functions, classes with their members, variables and imported names that ``body`` defines."""
    found = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= _names(node.body, f"{prefix}{node.name}.")
            elif prefix:
                attributes = (x for x in ast.walk(node) if isinstance(x, ast.Attribute))
                found |= {prefix + x.attr for x in attributes if isinstance(x.value, ast.Name) and x.value.id == "self"}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}
            found |= {prefix + name for name in names}
            if names & LAZY and isinstance(node.value, ast.Dict):
                found |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {prefix + (alias.asname or alias.name) for alias in node.names}
        elif isinstance(node, (ast.If, ast.Try)):
            found |= _names(node.body, prefix) | _names(node.orelse, prefix)
    return found


def test_roles_in_docstrings_and_comments_name_what_there_is():
    package = ROOT / "moba_cp" / "__init__.py"
    files = {"moba_cp": package, **MODULES}
    names = {module: _names(ast.parse(path.read_text()).body) for module, path in files.items()}

    def is_there(module: str, reference: str) -> bool:
        levels = len(reference) - len(reference.lstrip("."))
        here = module.split(".") if files[module].name == "__init__.py" else module.split(".")[:-1]
        base = ".".join(here[: len(here) - levels + 1])
        places = [f"{base}.{reference.lstrip('.')}"] if levels else [reference, f"{module}.{reference}"]
        for place in places:
            parts = place.split(".")
            for count in range(len(parts), 0, -1):
                owner, rest = ".".join(parts[:count]), ".".join(parts[count:])
                if owner in files and (not rest or rest in names[owner]):
                    return True
        # Within a class its own methods and attributes go by their names alone.
        return any(name.endswith(f".{reference}") for name in names[module])

    missing = [
        f"{path.relative_to(ROOT)}: {reference}"
        for module, path in files.items()
        for reference in ROLE.findall(path.read_text())
        if not reference.startswith(("torch", "megatron.")) and not is_there(module, reference)
    ]
    assert not missing, "\n".join(missing)


# Where the files that documents name are looked for: in the package, or in a room that is being described.
ROOTS = [ROOT, *(ROOT / place for place in ("moba_cp", "moba_cp/cp", "moba_cp/cp/exchange", "kernels", "docs"))]


def test_what_the_architecture_page_says_is_in_a_file_is_in_it():
    """``name`` in ``file``, or ``file`` (``name``, ...)."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    pairs = [(path, name) for name, path in re.findall(r"`([\w.]+)`(?:, made)? in `([\w./]+\.py)`", text)]
    for path, names in re.findall(r"`([\w./]+\.py)` \(((?:`[\w.]+`(?:, )?)+)", text):
        pairs += [(path, name) for name in re.findall(r"`([\w.]+)`", names)]
    assert len(pairs) > 12
    for path, name in pairs:
        (file,) = {root / path for root in ROOTS if (root / path).exists()}
        for word in name.split("."):
            assert re.search(rf"\b{word}\b", file.read_text()), f"{path} has no {name}"


def test_files_that_documents_name_are_there():
    """Links, and paths from the root, from the package or from a room; a name without a folder may be in any room."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    file, link = re.compile(r"`([\w./-]+\.(?:py|sh|md))`"), re.compile(r"\]\(([\w./-]+)\)")
    anywhere = {path.name for room in ("moba_cp", "kernels", "launchers", "tests") for path in (ROOT / room).rglob("*")}
    # Megatron-LM's own.
    anywhere |= {"preprocess_data.py", "pretrain_gpt.py", "distrib_optimizer.py"}
    theirs = {"tools/preprocess_data.py", "megatron/training/models/gpt.py"}
    missing = [
        f"{document.name}: {name}"
        for document in documents
        for name in sorted({*link.findall(document.read_text()), *file.findall(document.read_text())} - theirs)
        if name not in anywhere and not any((root / name).exists() for root in [document.parent, *ROOTS])
    ]
    assert not missing, "\n".join(missing)
