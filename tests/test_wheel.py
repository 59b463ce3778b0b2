"""What `python -m build` makes: a wheel with every file of the packages, which works alone, and the whole source."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import nsgd

ROOT = Path(__file__).parent.parent
PACKAGES = ("nsgd", "lightning_modules")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the source distribution and the wheel that is made from it."""
    for name in ("build", "hatchling"):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def files_of(folder):
    """The files below a folder of the repository, but for what Python leaves there."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel):
    wanted = set().union(*(files_of(package) for package in PACKAGES))
    assert {"nsgd/py.typed", "lightning_modules/report/page.css", "lightning_modules/study/named/digits.yaml"} <= wanted
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted


def test_the_wheel_says_what_it_is_and_what_it_needs(wheel):
    def metadata(name):
        return wheel.read(f"nsgd-{nsgd.__version__}.dist-info/{name}").decode()

    about = message_from_string(metadata("METADATA"))
    needs = about.get_all("Requires-Dist")
    assert about["Version"] == nsgd.__version__
    assert about["License-Expression"] == "MIT"
    assert metadata("licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert {need.split(">")[0] for need in needs if "extra ==" not in need} == {"torch", "scipy"}
    assert set(about.get_all("Provides-Extra")) == {"lightning", "data", "tensorboard", "ray", "dev"}
    assert "nsgd = lightning_modules.commands.main:main" in metadata("entry_points.txt")


READS_EVERYTHING = """
from pathlib import Path

import nsgd
from lightning_modules.report.page import write_page
from lightning_modules.study.options import NAMED

page = write_page(Path("report.html"), title="A page", figures={})
print(nsgd.__file__, *sorted(path.stem for path in NAMED.glob("*.yaml")), len(page.read_text()) > 10_000, sep="\\n")
"""


def test_an_unpacked_wheel_reads_its_own_files(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READS_EVERYTHING]
    done = subprocess.run(
        command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    place, *studies, page = done.stdout.split("\n")[:-1]
    assert Path(place) == tmp_path / "site" / "nsgd" / "__init__.py"
    assert {"digits", "digits-32", "digits-1024"} <= set(studies)
    assert page == "True"


def test_the_source_has_what_its_tests_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in (*PACKAGES, "tests", "benchmarks", ".ci"):
        assert files_of(folder) <= names, folder
    assert {"pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"} <= names
    assert not [name for name in names if "__pycache__" in name]
