"""Plug-ins are files: listed without importing, loaded by name or dotted path, missed with a hint."""

import sys
from pathlib import Path

import pytest

from trainables import plugins
from trainables.errors import PluginError


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's own package `mylab` on the path, with a good and a broken method."""
    folder = tmp_path / "mylab"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""A lab."""\n')
    (folder / "ternary.py").write_text('"""Ternary weights.\n\nMore text."""\nclass Method: pass\nclass Other: pass\n')
    (folder / "broken.py").write_text('"""Needs what is not there."""\nimport not_installed_anywhere\n')
    (folder / "_hidden.py").write_text('"""Not a plug-in."""\n')
    (folder / "silent.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.mark.parametrize("package", plugins.KINDS.values())
def test_every_plugin_of_ours_has_a_describing_first_line(package):
    found = plugins.describe(package)
    assert found
    assert [name for name, line in found.items() if len(line) < 15] == []


def test_describing_gives_first_lines_and_imports_nothing(lab):
    assert plugins.describe("mylab") == {
        "broken": "Needs what is not there.",
        "silent": "",
        "ternary": "Ternary weights.",
    }
    assert not any(name.startswith("mylab.") for name in sys.modules)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(PluginError, match="package 'no_such_package' is not installed"):
        plugins.describe("no_such_package")


def test_a_module_is_not_a_package_of_plugins():
    with pytest.raises(PluginError, match=r"package 'trainables\.cost' is not installed"):
        plugins.describe("trainables.cost")


@pytest.mark.parametrize(("kind", "package"), plugins.KINDS.items())
def test_every_plugin_of_ours_loads_by_its_name(kind, package):
    for name in plugins.describe(package):
        assert plugins.load(kind, name).__name__ == f"{package}.{name}"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("methods", "lsqq", "unknown method 'lsqq'; did you mean 'lsq'? (raysearch list methods)"),
        ("models", "lenet", "unknown model 'lenet'; did you mean 'lenet5'? (raysearch list models)"),
        ("data", "cifar", "unknown data set 'cifar'; did you mean 'cifar10'? (raysearch list data)"),
        ("spaces", "unifrom", "unknown space 'unifrom'; did you mean 'uniform'? (raysearch list spaces)"),
        ("methods", "zzzzzz", "unknown method 'zzzzzz' (raysearch list methods)"),
        ("methods", "", "unknown method '' (raysearch list methods)"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(kind, name, message):
    with pytest.raises(PluginError) as caught:
        plugins.load(kind, name)
    assert str(caught.value) == message


def test_a_dotted_path_loads_a_module_of_ones_own(lab):
    assert plugins.load("methods", "mylab.ternary").__doc__.startswith("Ternary weights.")


def test_a_dotted_path_works_wherever_a_name_does(lab):
    assert plugins.attribute("methods", "mylab.ternary", "Method").__name__ == "Method"


@pytest.mark.parametrize("path", ["mylab.ternary:Other", "mylab.ternary:Method"])
def test_a_path_with_a_colon_names_another_object(lab, path):
    assert plugins.attribute("methods", path, "Method").__name__ == path.split(":")[1]


def test_a_module_without_a_dot_can_be_named_with_a_colon(lab):
    assert plugins.attribute("methods", "mylab:__doc__", "Method") == "A lab."


def test_a_module_that_is_not_there_is_named_with_the_reason():
    with pytest.raises(PluginError, match=r"cannot import 'mylab2\.ternary': ModuleNotFoundError: No module named"):
        plugins.load("methods", "mylab2.ternary")
    with pytest.raises(PluginError, match=r"cannot import 'mylab2': ModuleNotFoundError"):
        plugins.attribute("methods", "mylab2:Method", "Method")


def test_a_module_that_does_not_import_is_named_with_the_reason(lab):
    with pytest.raises(PluginError, match=r"cannot import 'mylab\.broken'.*not_installed_anywhere") as caught:
        plugins.load("methods", "mylab.broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_module_without_the_wanted_object_is_an_error(lab):
    with pytest.raises(PluginError, match=r"'mylab\.silent' does not define 'Method'; a plug-in of methods must"):
        plugins.attribute("methods", "mylab.silent", "Method")
    with pytest.raises(PluginError, match=r"'mylab\.ternary' does not define 'Missing'"):
        plugins.attribute("methods", "mylab.ternary:Missing", "Method")


def test_the_path_of_a_file_works_wherever_a_name_does(lab, monkeypatch):
    file = lab / "ternary.py"
    found = plugins.attribute("methods", str(file), "Method")
    assert found.__name__ == "Method"
    assert plugins.attribute("methods", f"{file}:Other", "Method").__name__ == "Other"
    monkeypatch.chdir(lab)
    assert plugins.attribute("methods", "ternary.py", "Method") is found  # run once, wherever it is named from
    assert plugins.located("./ternary.py:Other") == f"{file}:Other"


def test_a_file_defines_dataclasses_like_any_module(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Method:\n    x: int"
    )
    (tmp_path / "fresh.py").write_text(text + "\n")
    assert plugins.attribute("methods", str(tmp_path / "fresh.py"), "Method")(3).x == 3


@pytest.mark.parametrize("name", ["lsq", "mylab.ternary", "mylab.ternary:Other"])
def test_only_a_file_has_a_place(name):
    assert plugins.located(name) == name


def test_a_file_that_is_not_there_or_does_not_run_is_named_with_the_reason(lab):
    with pytest.raises(PluginError, match=r"no file .*none\.py on this machine"):
        plugins.load("methods", str(lab / "none.py"))
    for _ in range(2):
        with pytest.raises(PluginError, match=r"cannot run .*broken\.py: ModuleNotFoundError"):
            plugins.load("methods", str(lab / "broken.py"))


@pytest.mark.parametrize(
    ("name", "hint"), [("wieght", "; did you mean 'weight'?"), ("weight", "; did you mean 'weight'?"), ("zzz", "")]
)
def test_the_nearest_name_is_a_hint_or_nothing(name, hint):
    assert plugins.nearest(name, ["weight", "activation"]) == hint
