"""README's install line, run in an empty environment as a newcomer would, and what is installed then.

python -m pytest tests -m network                                      all but the first test: minutes, gigabytes
FLASH_ATTN_EXT_PYTHON=python3.13 python -m pytest tests -m network     in an environment of another Python
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("FLASH_ATTN_EXT_PYTHON", sys._base_executable)
SECONDS = 1200  # for one command; torch and what it needs are gigabytes


def install_line():
    """The one of README."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (line,) = [line for block in blocks for line in block.splitlines() if line.startswith("pip install")]
    return line


def test_the_line_names_what_a_build_needs():
    """The build requirements, and torch. A build that is refused for want of torch says the same."""
    requires = re.search(r"^requires = \[(.+?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    first, second = install_line().split(" && ")
    assert sorted(shlex.split(first)[2:]) == sorted(["torch", *re.findall(r'"(.+?)"', requires)])
    setup = (ROOT / "setup.py").read_text()
    assert first.removeprefix("pip install torch ") in setup and f"\n    {second}\n" in setup


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A checkout in which nothing was ever built, and beside it an environment in which the line has been run."""
    folder = tmp_path_factory.mktemp("newcomer")
    checkout = folder / "checkout"
    generated = (
        "build build-* dist runs *.egg-info *.so _build_info.py _limits_table.py __pycache__ .*_cache .venv .git"
    )
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*generated.split()))
    subprocess.run([PYTHON, "-m", "venv", folder / "environment"], check=True)

    mine = ("PYTHON", "VIRTUAL_ENV", "FLASH_ATTN_EXT_CUDA")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    environment["PATH"] = f"{folder / 'environment' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run([sys.executable, ROOT / "tools" / "toolkit.py"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no kernels can be built here: {found.stderr}")
    environment["CUDA_HOME"] = found.stdout.strip()

    def bash(command, cwd=checkout):
        return subprocess.run(
            ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS
        )

    if bash(f"pip download --retries 0 --timeout 15 --no-deps --dest {folder / 'download'} ninja").returncode:
        pytest.skip("pip reaches no package index: there is no network")
    done = bash(install_line())
    assert done.returncode == 0, done.stdout + done.stderr
    yield SimpleNamespace(folder=folder, checkout=checkout, bash=bash)
    shutil.rmtree(folder)  # gigabytes


def info(newcomer, cwd):
    done = newcomer.bash("python -m flash_attn_ext info --json", cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.network
def test_it_installs_kernels_for_the_torch_of_the_environment(newcomer):
    facts = info(newcomer, newcomer.folder)
    assert facts["kernels_missing"] is None and facts["installed_in"].startswith(str(newcomer.folder / "environment"))
    assert facts["built_with"]["torch"] == facts["torch"].split("+")[0]
    done = newcomer.bash("pip check && python -m flash_attn_ext selftest --device cpu", newcomer.folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.network
def test_the_checkout_says_that_it_hides_what_was_installed(newcomer):
    facts = info(newcomer, newcomer.checkout)
    assert facts["installed_in"] == str(newcomer.checkout / "flash_attn_ext")
    installed = info(newcomer, newcomer.folder)["installed_in"]
    assert f"It hides the installed package, which is in {installed}." in facts["kernels_missing"]


@pytest.mark.network
def test_an_isolated_build_is_refused(newcomer):
    done = newcomer.bash("pip install .")
    assert done.returncode != 0 and "There is no torch here" in done.stdout + done.stderr
    assert info(newcomer, newcomer.folder)["kernels_missing"] is None, "what was installed still is"


@pytest.mark.network
def test_the_installed_package_passes_the_tests_of_the_checkout(newcomer):
    """`pytest`, unlike `python -m pytest`, does not put the checkout first."""
    done = newcomer.bash("pip install pytest hypothesis numpy && pytest tests -q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"flash_attn_ext of {info(newcomer, newcomer.folder)['installed_in']}" in done.stdout
