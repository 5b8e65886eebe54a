"""Who may import whom: packages in one order, no circle among modules, functions not hidden."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from forked import finish, start, without_fifa

SRC = Path(__file__).parents[1] / "src"

# A package imports those to its left, at the top of a file or inside a function.
ORDER = (
    ("errors", "formatting"),
    ("console",),
    ("shards",),
    ("config",),
    ("data",),
    ("models",),
    ("scoring",),
    ("selection",),
    ("training",),
    ("evaluation",),
    ("reporting",),
    ("moji",),
    ("run",),
    ("demo",),
    ("cli",),
)
LEVEL = {package: level for level, group in enumerate(ORDER) for package in group}


def module_name(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


def imports(path, *, types=False):
    """The modules of ours that a file imports, lazily or not; for type checkers only if asked."""
    found = set()

    def visit(node):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text("utf-8")))
    return {name for name in found if name in MODULES}


def package_of(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_below_it(module):
    package = package_of(module)
    if package in ("", "__main__"):
        return  # the public API reaches everywhere
    level = LEVEL[package]
    above = {
        name
        for name in imports(MODULES[module], types=True)
        if package_of(name) not in ("", package) and LEVEL[package_of(name)] >= level
    }
    assert not above


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports(path) - {name, "fifa"} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def load_all(modules):
    fifa = without_fifa()
    names = {name: getattr(fifa, name) for name in fifa.__all__}
    for module in modules:
        import_module(module)
    hidden = [name for name, value in names.items() if getattr(fifa, name) is not value]
    assert not hidden, hidden
    assert dir(fifa) == sorted([*fifa.__all__, "__version__"])  # completion knows what is public
    assert not set(fifa.__all__) & {module.split(".")[1] for module in modules}


def test_no_module_hides_a_public_function():
    inner = [name for name in MODULES if "." in name and name != "fifa.__main__"]
    finish(start(load_all, inner))
