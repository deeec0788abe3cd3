"""What an installation puts beside other people's modules."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
PACKAGES = {"sashimi", "baselines", "rawaudio", "cauchy_kernel", "metrics"}


def test_a_wheel_holds_the_packages_and_nothing_else(tmp_path):
    """No module named train, split_data or hubconf; weights, scripts and sources come along."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77, as pyproject.toml says")
    for path in ROOT.iterdir():
        if path.name in PACKAGES:
            shutil.copytree(path, tmp_path / path.name)
        elif path.suffix in (".py", ".toml", ".md") or path.name == "LICENSE":
            shutil.copy(path, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops - PACKAGES == {next(top for top in tops if top.endswith(".dist-info"))}
    for package in PACKAGES:
        sources = (".py", ".cpp", ".cu", ".h", ".css", ".js")
        ours = {p.name for p in (ROOT / package).iterdir() if p.suffix in sources}
        assert ours <= {name.split("/")[1] for name in names if name.startswith(f"{package}/")}
    shipped = {p.name for p in (ROOT / "sashimi" / "weights").iterdir() if p.is_file()}
    assert shipped <= {name.split("/")[-1] for name in names}
