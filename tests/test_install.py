"""Installations without the binary, or with one for another torch or Python, and source trees that hide an installed
package: CPU tensors work, and the reason is told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn_ext
from flash_attn_ext import _binary

USE = """
import torch, flash_attn_ext
q, k, v = torch.randn(3, 1, 5, 2, 8).requires_grad_()
flash_attn_ext.flash_attn_func(q, k, v, causal=True).sum().backward()
print(flash_attn_ext.supported(), flash_attn_ext.is_available())
"""
ON_CPU_ALONE = f"{flash_attn_ext.supported()} False"

# What a Hopper GPU would say, of meta tensors and of fake CUDA tensors.
REFUSALS = """
import torch, flash_attn_ext
from flash_attn_ext.limits import TABLE
from torch._subclasses.fake_tensor import FakeTensorMode

TABLE[-1]["backward"] = None  # the compiled module has another table: it leaves calls with an option to Python

def tensors(device, head_dim, dtype):
    return [torch.ones(2, 5, 4, head_dim, dtype=dtype, device=device).requires_grad_() for _ in range(3)]

for head_dim in (64, 72, 100, TABLE[-1]["head_dim"], 512):
    for dtype in (torch.bfloat16, torch.float32):
        text = flash_attn_ext.explain(*tensors("meta", head_dim, dtype), softcap=30.0, target="hopper")
        print(head_dim, dtype, text)
        with FakeTensorMode():
            for attention in (flash_attn_ext.flash_attn_func, torch.ops.flash_attn_ext.forward):
                try:
                    attention(*tensors("cuda", head_dim, dtype), softcap=30.0)
                except ValueError as refusal:
                    print(head_dim, dtype, refusal)
"""


@pytest.fixture
def package(tmp_path):
    """The package's Python files alone, as an installation without CUDA has them."""
    source = Path(flash_attn_ext.__file__).parent
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("*.so", "_build_info.py", "__*__"))
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(source / name, tmp_path / source.name)
    return tmp_path / source.name


def python(package, *arguments, cwd=None, **environment):
    run = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(package.parent)} | environment,
        cwd=cwd or package.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout, run.stderr


def test_without_the_binary(package):
    stdout, stderr = python(package, "-c", USE)
    assert stdout.split("\n")[0] == ON_CPU_ALONE
    assert "Warning" not in stderr, "such an installation is a choice"
    info = json.loads(python(package, "-m", "flash_attn_ext", "info", "--json")[0])
    assert "without its GPU kernels" in info["unavailable"]
    assert info["head_dims"] == {which: list(dims) for which, dims in flash_attn_ext.supported().items()}


def test_refusals_need_no_kernels(package):
    """They are the same with and without: of head dims outside the table, of gradients, of dtypes."""
    stdout, _ = python(package, "-W", "ignore", "-c", REFUSALS)
    with_kernels, _ = python(Path(flash_attn_ext.__file__).parent, "-W", "ignore", "-c", REFUSALS)
    assert stdout == with_kernels and stdout.count("head_dim is 100;") == 3 and stdout.count("float32; on cuda") == 15
    assert stdout.count("has no backward kernel") == 3
    assert stdout.startswith("64 torch.bfloat16 None\n")


@pytest.mark.parametrize(
    ("built", "words"),
    [
        ({"torch": "1.13.1", "python": "3.10.1"}, "built for torch 1.13.1, and this is torch "),
        ({"torch": torch.__version__, "python": "3.9.1"}, "built for Python 3.9.1, and this is Python "),
    ],
    ids=["torch", "python"],
)
def test_with_a_binary_for_another(package, built, words):
    (package / "_build_info.py").write_text(f"BUILD = {built}\n")
    (package / "_C.so").write_text("not to be loaded")
    stdout, stderr = python(package, "-c", USE)
    assert stdout.split("\n")[0] == ON_CPU_ALONE
    assert "RuntimeWarning" in stderr and words in stderr
    assert "pip install --no-build-isolation --no-deps --force-reinstall ." in stderr, (
        "with its dependencies, torch too"
    )


@pytest.fixture
def source_tree(package):
    """The package once more, in a checkout where nothing is built."""
    root = package.parent / "checkout"
    shutil.copytree(package, root / package.name)
    (root / "csrc").mkdir()
    return root


@pytest.mark.parametrize(("inside", "leave"), [(True, "leave this folder"), (False, "take {} out of PYTHONPATH")])
def test_a_source_tree_hides_the_installed_package(package, source_tree, inside, leave):
    places = (source_tree, package.parent)
    kernels_missing = (
        f"this is the source tree, {source_tree / package.name}, and its GPU kernels are not built. It hides the "
        f"installed package, which is in {package}. To import that one, {leave.format(source_tree)}; or build them in "
        "place: make build ENV=current."
    )
    where = (
        {"cwd": source_tree}
        if inside
        else {"cwd": source_tree / "csrc", "PYTHONPATH": os.pathsep.join(map(str, places))}
    )
    stdout, stderr = python(package, "-m", "flash_attn_ext", "info", "--json", **where)
    assert json.loads(stdout)["kernels_missing"] == kernels_missing
    assert "RuntimeWarning" in stderr and kernels_missing in stderr
    assert "installed without" not in stdout + stderr and "pip install" not in stdout + stderr
    reason = "import flash_attn_ext.limits as limits; print(limits.why_unavailable())"
    assert python(package, "-c", reason, **where)[0].strip().endswith(kernels_missing)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python takes no notice of PYTHONSAFEPATH before 3.11")
def test_the_installed_package_from_inside_a_source_tree(package, source_tree):
    stdout, stderr = python(package, "-m", "flash_attn_ext", "info", "--json", cwd=source_tree, PYTHONSAFEPATH="1")
    assert json.loads(stdout)["installed_in"] == str(package) and "Warning" not in stderr


def test_a_source_tree_alone(monkeypatch):
    monkeypatch.setattr(_binary, "IN_SOURCE_TREE", True)
    assert _binary._way_out(None) == "To have them, build them in place: make build ENV=current."


def test_info_in_words(package):
    stdout, _ = python(package, "-m", "flash_attn_ext", "info")
    assert flash_attn_ext.__version__ in stdout
    assert stdout.count("without its GPU kernels") == 1  # once, and short where every GPU is named
    assert "CUDA tensors        refused: no GPU kernels" in stdout
