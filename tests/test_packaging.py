"""What a user installs: the sdist, the wheel made from it, and that wheel in an environment of its own."""

import configparser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

import mpifedlora

ROOT = Path(__file__).parents[1]
ALONE = {
    *("click", "h5py", "mpi4py", "numpy", "peft", "pydantic", "rich", "safetensors", "tomli", "torch"),
    "transformers",
}
BUILD = "import sys, setuptools.build_meta as build; print(build.build_{kind}(sys.argv[1]))"

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")


def build(kind, source, target):
    """Build as pip does, without a network, and return the file."""
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD.format(kind=kind), str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def sdist(folder):
    """From the files that git knows alone."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    checkout = folder / "checkout"
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
            (checkout / name).chmod((ROOT / name).stat().st_mode)
    return build("sdist", checkout, folder / "dist")


@pytest.fixture(scope="module")
def unpacked(folder, sdist):
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    return root


@pytest.fixture(scope="module")
def wheel(folder, unpacked):
    return build("wheel", unpacked, folder / "dist")


def requirements(extra=None):
    """Return the names of what is needed, alone or for an extra."""
    found = set()
    for line in requires("mpifedlora"):
        wanted, _, marker = line.partition(";")
        of = re.search(r"extra == ['\"](\w+)['\"]", marker)
        if (of and of[1]) == extra:
            found.add(re.match(r"[\w.-]+", wanted)[0].lower())
    return found


def test_alone_it_needs_what_run_plan_and_doctor_need():
    assert requirements() == ALONE


def test_the_sdist_has_what_the_documents_speak_of(unpacked):
    for name in (
        *("LICENSE", "README.md", "CHANGES.md", "CITATION.cff", "Makefile", "constraints.txt", "mkdocs.yml"),
        *("examples/newsgroups.toml", "slurm/train.sbatch", "slurm/mpifedlora.def", "docs/tutorial.md"),
        *("tests/run_mpi.sh", "benchmarks/run.sh", "mpifedlora/py.typed"),
    ):
        assert (unpacked / name).is_file(), name
    assert os.access(unpacked / "tests/run_mpi.sh", os.X_OK)
    assert not list(unpacked.rglob("*.pyc"))


def test_the_wheel_has_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"mpifedlora", f"mpifedlora-{mpifedlora.__version__}.dist-info"}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "mpifedlora").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == files
    assert "mpifedlora/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert "Requires-Python: >=3.10" in text
    for minor in (10, 11, 12, 13):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}" in text


@pytest.mark.slow
def test_the_wheel_runs_in_a_clean_environment(folder, wheel):
    fresh = folder / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", "--python", str(fresh / "bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
    # Its dependencies are those of the tests; its own code comes first on the path.
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def call(*command):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = str(fresh / "bin/mpifedlora")
    assert call(program, "version").splitlines()[0].split() == ["mpifedlora", mpifedlora.__version__]
    assert "Usage: mpifedlora" in call(program, "--help")
    where = call(str(fresh / "bin/python"), "-c", "import mpifedlora; print(mpifedlora.__file__)")
    assert Path(where.strip()).is_relative_to(site)


WITHOUT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from pathlib import Path
from mpifedlora.runtime import launch
short = ["federation.num_rounds=1", "initiating.rounds=0"]
sys.exit(launch.run(Path({run_file!r}), short, Path({out!r}), False))
"""


def test_a_run_needs_no_extra(tiny_run_file, tmp_path):
    """Nothing that only an extra brings is imported."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = "\n".join(parser["options.extras_require"].values()).split()
    brought = {re.match(r"[\w-]+", line)[0] for line in lines if re.match(r"[a-z]", line)} - ALONE
    assert {"matplotlib", "pytest"} <= brought
    names = sorted(name.replace("-", "_") for name in brought)
    code = WITHOUT.format(names=names, run_file=str(tiny_run_file), out=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_citation_is_whole():
    """CITATION.cff is YAML of the keys that its schema 1.2.0 asks for, and names this version."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == mpifedlora.__version__
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"].endswith("v1")
