"""The source distribution holds what a build needs, a wheel built from it the command line's table. A package with
kernels requires the torch that it was built with, and without that torch it is not built.

And what stands in several places is the same everywhere: the version, the figures in the documents.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import flash_attn_ext

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "tools"))
import tables  # noqa: E402 (what writes the tables of the documents)
import toolkit  # noqa: E402


def run(*arguments, cwd, **environment):
    process = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """An unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    run("setup.py", "-q", "egg_info", "--egg-base", str(folder), "sdist", "-d", str(folder), cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def test_sources_are_complete(sdist):
    """And of one version, whatever torch and toolkit they were packed with."""
    assert sdist.name == f"flash_attn_ext-{flash_attn_ext.__version__}"

    def files(root, folder, *suffixes):
        return {
            str(path.relative_to(root))
            for path in (root / folder).rglob("*")
            if path.is_file() and path.suffix in suffixes
        }

    for folder in ("csrc", "tests", "tools", "benchmarks", "docs"):
        suffixes = (".h", ".cuh", ".cu", ".cpp", ".py", ".txt", ".md", ".json", ".csv", ".toml")
        assert files(sdist, folder, *suffixes) == files(ROOT, folder, *suffixes)
    assert not list(sdist.rglob("*.so")) and not list(sdist.rglob("_build_info.py"))


def test_a_wheel_without_kernels_from_the_sources(sdist, tmp_path):
    run("setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), cwd=sdist, FLASH_ATTN_EXT_CUDA="0")
    (wheel,) = tmp_path.glob("*-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path)
    assert not list(tmp_path.rglob("_build_info.py"))
    package, of_wheel = ROOT / "flash_attn_ext", tmp_path / "flash_attn_ext"

    def files(folder):
        return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".py", ".json")}

    assert files(of_wheel) == files(package) - {Path("_build_info.py")}
    stdout = run(
        *("-c", "from flash_attn_ext.cli import table; print(table.head_dims())"),
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    from flash_attn_ext.cli import table

    assert stdout.strip() == str(table.head_dims())


def requirements(metadata):
    return [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]


def test_the_torch_that_a_package_requires(tmp_path):
    """Of its minor version where kernels are in it."""
    for switch, name in (("0", "without"), ("1", "with")):
        (tmp_path / name).mkdir()
        run("setup.py", "-q", "dist_info", "--output-dir", str(tmp_path / name), cwd=ROOT, FLASH_ATTN_EXT_CUDA=switch)
    without, kernels = (next(tmp_path.glob(f"{name}/*/METADATA")).read_text() for name in ("without", "with"))
    assert requirements(without) == ["Requires-Dist: torch>=2.11"]
    minor = ".".join(torch.__version__.split(".")[:2])
    assert requirements(kernels) == [f"Requires-Dist: torch=={minor}.*" if torch.version.cuda else "torch>=2.11"]


@pytest.mark.parametrize(
    ("command", "before", "words"),
    [
        ("bdist_wheel", "sys.modules['torch'] = None", "There is no torch here to build the GPU kernels with."),
        (
            "bdist_wheel",
            "import torch; torch.__version__ = type(torch.__version__)('2.8.1')",
            "torch 2.8.1 is installed",
        ),
        (
            "bdist_wheel",
            "sys.modules['setuptools.command.bdist_wheel'] = None",
            "is too old to build a wheel by itself",
        ),
    ],
)
def test_builds_that_are_refused(tmp_path, command, before, words):
    """Build isolation hides torch, as sys.modules does here. What the build was told is all that is printed."""
    setup = f"import runpy, sys; {before}; sys.argv = ['setup.py', '-q', {command!r}]; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", setup], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("cuda", "offered"), [("12.8", False), ("13.0", True)])
def test_ways_to_a_toolkit(monkeypatch, cuda, offered):
    """PyPI's is no way out where it has no nvcc."""
    monkeypatch.setattr(toolkit, "_candidates", lambda: [Path("nowhere")])
    with pytest.raises(FileNotFoundError, match="nowhere: no bin/nvcc\nSet CUDA_HOME; or install") as refusal:
        toolkit.find(cuda)
    assert (f"pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]=={cuda}.*'" in str(refusal.value)) == offered
    assert "FLASH_ATTN_EXT_CUDA=0 pip install ." in str(refusal.value)


def test_wheels_are_built_for_every_python_and_torch_that_is_tested():
    """A list of versions in one workflow, what others say in their own places."""
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    torches, pythons = (
        re.findall(r'"([\d.]+)"', re.search(rf"^ +{name}: \[(.+)\]", workflow, re.MULTILINE)[1])
        for name in ("torch", "python")
    )
    assert f"'torch=={torches[0]}.*'" in (ROOT / "Makefile").read_text()
    assert f'requires-python = ">={pythons[0]}"' in (ROOT / "pyproject.toml").read_text()
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert set(re.findall(r'"(3\.\d+)"', ci)) <= set(pythons)


def test_the_tables_of_the_documents_are_up_to_date():
    """Those of the committed results, and where the kernels are built those of the head dims."""
    assert tables.check() == [], "run: python benchmarks/tables.py"


def test_the_version_stands_in_one_place():
    version = re.escape(flash_attn_ext.__version__)
    sources = [
        *ROOT.glob("*.py"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.txt"),
        *ROOT.glob("*.cfg"),
        *ROOT.glob("Makefile"),
    ]
    sources += (ROOT / "flash_attn_ext").rglob("*.py")
    found = [path.name for path in sources if re.search(rf"(?<![\d.]){version}(?![\d.])", path.read_text())]
    assert found == ["_version.py"]
    assert re.search(rf"^## {version}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
