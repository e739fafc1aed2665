"""The wheel: four packages and nothing else, each with all its files."""

import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"raysearch", "search_spaces", "trainables", "analysis"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Content of each file of the wheel by its path; the folder of metadata is named `dist-info`."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    (path,) = folder.iterdir()
    with ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    version = path.name.split("-")[1]
    return {
        name.replace(f"raysearch-{version}.dist-info", "dist-info", 1): content for name, content in contents.items()
    }


def test_the_wheel_holds_four_packages_and_its_metadata(wheel: dict[str, bytes]) -> None:
    assert {name.split("/")[0] for name in wheel} == PACKAGES | {"dist-info"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_source_file_of_a_package_is_in_the_wheel(wheel: dict[str, bytes], package: str) -> None:
    sources = [path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".css", ".js")]
    written = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources}
    assert f"{package}/__init__.py" in written
    assert {name: wheel.get(name) for name in written} == written


def test_the_wheel_carries_its_license(wheel: dict[str, bytes]) -> None:
    assert message_from_bytes(wheel["dist-info/METADATA"])["License-Expression"] == "Apache-2.0"
    assert wheel["dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_installs_the_command(wheel: dict[str, bytes]) -> None:
    assert wheel["dist-info/entry_points.txt"].decode().splitlines() == [
        "[console_scripts]",
        "raysearch = raysearch.cli:main",
    ]
