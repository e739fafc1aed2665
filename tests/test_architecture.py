"""The arrows between the packages, read from their source: leaves know neither each other nor the crown.

Also what keeps them light and readable: heavy libraries load where they are used, files stay short.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {  # what each may import beside the standard library and itself
    "search_spaces": {"optuna"},
    "trainables": {"torch", "torchvision", "numpy", "pydantic", "safetensors", "filelock", "onnx", "onnxruntime"}
    | {"pandas", "pyarrow", "PIL", "sklearn"},
    "analysis": {"numpy", "pandas", "pyarrow", "matplotlib", "scipy"},
}
LATE = {  # what each imports only inside functions
    "raysearch": {"ray", "mlflow", "torch", "optuna", "matplotlib", "pandas"},
    "analysis": {"matplotlib", "scipy"},
}
DERIVED = {  # files made of a late library's types; they are themselves imported inside functions
    "raysearch/book.py": {"optuna"},
    "raysearch/search/ledger.py": {"optuna"},
    "raysearch/search/samplers.py": {"optuna"},
    "raysearch/search/twin.py": {"optuna"},
    "raysearch/search/proposals.py": {"optuna"},
    "raysearch/cluster/searcher.py": {"ray"},
    "raysearch/cluster/slots.py": {"ray"},
    "raysearch/cluster/group.py": {"ray"},
    "raysearch/mirror/entries.py": {"pandas"},
    "raysearch/registered_model.py": {"mlflow"},  # MLflow imports it
}
LONGEST = 400
GROUPED = ["analysis", "trainables", "trainables/methods", "trainables/export", "raysearch"]
GROUPED += ["raysearch/search", "raysearch/cluster", "raysearch/shared_weights", "raysearch/mirror"]


def sources(*packages: str) -> dict[str, str]:
    """Text of every Python file of the packages, by its path from the repository's root."""
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def nodes(tree: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """All nodes below `tree`; with `at_import` only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from nodes(node, at_import=at_import)


def imported(source: str, *, at_import: bool = False) -> set[str]:
    """Top-level names of what the source imports; imports relative to itself are left out."""
    found = set()
    for node in nodes(ast.parse(source), at_import=at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("package", LEAVES)
def test_a_leaf_imports_the_standard_library_its_own_libraries_and_itself(package: str) -> None:
    allowed = LEAVES[package] | {package} | sys.stdlib_module_names
    strange = {path: imported(source) - allowed for path, source in sources(package).items()}
    assert {path: names for path, names in strange.items() if names} == {}


@pytest.mark.parametrize("package", LATE)
def test_heavy_libraries_are_imported_inside_functions(package: str) -> None:
    early = {
        path: imported(source, at_import=True) & LATE[package] - DERIVED.get(path, set())
        for path, source in sources(package).items()
    }
    assert {path: names for path, names in early.items() if names} == {}


@pytest.mark.parametrize("module", ["raysearch", "raysearch.cli"])
def test_importing_the_platform_loads_nothing_heavy(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    loaded = set(json.loads(answer.stdout))
    assert module in loaded
    assert loaded & LATE["raysearch"] == set()


def test_every_file_is_short_and_named_after_what_it_does() -> None:
    files = sources("raysearch", *LEAVES)
    assert {path: len(text.splitlines()) for path, text in files.items() if len(text.splitlines()) > LONGEST} == {}
    assert {Path(path).stem for path in files} & {"utils", "util", "helpers", "common"} == set()


@pytest.mark.parametrize("package", GROUPED)
def test_the_docstring_of_a_package_says_once_where_each_of_its_files_belongs(package: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text("utf-8"))) or ""
    _, _, groups = docstring.partition("Where to find what:")
    told = [name for line in groups.splitlines() for name in re.findall(r"[\w/]+", re.split(" {2,}", line)[-1])]
    files = [path.stem for path in (ROOT / package).glob("*.py") if path.stem != "__init__"]
    folders = [f"{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")]
    assert sorted(told) == sorted(files + folders)


def test_every_folder_of_tests_is_a_package() -> None:
    """Otherwise `tests/raysearch` would shadow `raysearch`. Golden vectors are data."""
    folders = [folder for folder in (ROOT / "tests").rglob("*") if folder.is_dir()]
    bare = {folder.relative_to(ROOT) for folder in folders if not (folder / "__init__.py").is_file()}
    assert {folder for folder in bare if not {"golden", "__pycache__"} & set(folder.parts)} == set()


@pytest.mark.parametrize(
    ("source", "anywhere", "at_import"),
    [
        ("import ray.tune", {"ray"}, {"ray"}),
        ("from torch import nn as n, Tensor", {"torch"}, {"torch"}),
        ("class A:\n    import ray", {"ray"}, {"ray"}),
        ("try:\n    import ray\nexcept ImportError:\n    import torch", {"ray", "torch"}, {"ray", "torch"}),
        ("def f():\n    import ray", {"ray"}, set()),
        ("class A:\n    async def f(self):\n        from ray import tune", {"ray"}, set()),
        ("if typing.TYPE_CHECKING:\n    import ray", {"ray"}, set()),
        ("from . import torch", set(), set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, anywhere: set[str], at_import: set[str]) -> None:
    assert (imported(source), imported(source, at_import=True)) == (anywhere, at_import)
