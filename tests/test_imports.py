"""The list of folders is the architecture: a module imports only from rows above its own, or from its own folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "gossamer"

ROWS = (
    "errors",
    "formats",
    "kernels",
    "checkpoints",
    "layers",
    "models",
    "adapters",
    "memory",
    "demo",
    "pipeline",
    "bench",
    "cli",
    "__main__",
)


def row_of(module: str) -> int:
    """Row of a dotted module name inside the package; the package itself stands below all rows."""
    parts = module.split(".")
    return ROWS.index(parts[1]) if len(parts) > 1 else len(ROWS)


def module_name(path: Path) -> str:
    parts = ["gossamer", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> list[str]:
    """Every gossamer module that a file imports: top level, in functions, under TYPE_CHECKING, by string."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from gossamer import formats` imports the folder, not the package's own namespace
            found += [f"{source}.{alias.name}" for alias in node.names] if source == "gossamer" else [source]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            first = node.args[0] if node.args else None
            assert isinstance(first, ast.Constant), f"{path}: import by a computed name"
            found.append(str(first.value))
    return [module for module in found if module.split(".")[0] == "gossamer"]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_folder_has_a_row():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | files == set(ROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = row_of(module_name(path))
    wrong = [module for module in imported_modules(path) if row_of(module) > own]
    assert not wrong, f"{module_name(path)} imports {wrong} from below its own row"


def test_the_check_can_fail(tmp_path):
    assert row_of("gossamer.formats.nf4") < row_of("gossamer.pipeline.load")
    assert row_of("gossamer") == len(ROWS), "importing the package's own namespace from inside it is never allowed"
