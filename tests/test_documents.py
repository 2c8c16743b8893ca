"""The documents: their programs run where the package is installed, and what they say stands in one place."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import needs_kernels

import flash_attn_ext
from flash_attn_ext import keywords

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def program(name):
    """The code block of the documents whose first line is the name of its file."""
    (text,) = [block for path in DOCUMENTS for block in blocks(path, "python") if block.startswith(f"# {name}\n")]
    return text


TORCH_ABORTS = "terminate called without an active exception"


def run(folder, *arguments, torch_may_abort=False):
    """In a folder that holds nothing else. The package comes from where it is imported here.

    torch_may_abort: on a busy machine processes of torch.distributed now and then abort while they end, after their
    work is done and with any attention; what they printed counts.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(flash_attn_ext.__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    aborted = torch_may_abort and TORCH_ABORTS in process.stderr
    assert process.returncode == 0 or aborted, process.stdout + process.stderr
    return process.stdout


def test_the_lines_by_which_adapters_are_turned_on(tmp_path):
    """Those of README's table that are Python."""
    _, _, table = README.read_text().partition("## Use it from")
    lines = re.findall(r"\[`(from \S+ import [^`]+)`\]", table)
    assert len(lines) == 3
    if find_spec("transformers") is None:
        lines = [line for line in lines if ".transformers " not in line]
    for line in lines:
        assert run(tmp_path, "-c", line) == ""


def test_the_profiled_program(tmp_path):
    (tmp_path / "profile_attention.py").write_text(program("profile_attention.py"))
    table = run(tmp_path, "profile_attention.py")
    assert all(name in table for name in ("attention forward", "attention backward", "flash_attn_ext::forward"))
    assert (tmp_path / "attention.json").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("packed_documents.py", "True\n"),
        ("packed_positions.py", "[0, 1, 2, 0, 0, 1, 2, 3]\nTrue\n"),
        ("packed_loss.py", "True\nTrue\n"),
        ("its_names.py", "torch.Size([2, 512, 8, 64])\n"),
        ("its_module.py", "torch.Size([2, 512, 8, 64])\n"),
        pytest.param("torchs_own.py", "torch.Size([2, 8, 512, 64])\n", marks=needs_kernels),
    ],
)
def test_the_programs_with_packed_documents_and_adapters(tmp_path, name, printed):
    (tmp_path / name).write_text(program(name))
    assert run(tmp_path, name) == printed


def test_the_program_with_transformers(tmp_path):
    pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")
    (tmp_path / "fa_ext.py").write_text(program("fa_ext.py"))
    assert run(tmp_path, "fa_ext.py") == "fa_ext\n"


def test_the_program_with_torchtitan(tmp_path):
    pytest.importorskip("torchtitan.models.common.attention", reason="torchtitan is not there", exc_type=ImportError)
    (tmp_path / "titan_attention.py").write_text(program("titan_attention.py"))
    assert run(tmp_path, "titan_attention.py") == "(1, 512, 8, 64) True\n"


def run_twice(folder, name):
    """A program of the documents as two processes."""
    torch_distributed = pytest.importorskip("torch.distributed")
    if not torch_distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    (folder / name).write_text(program(name))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return run(folder, *launcher, name, torch_may_abort=True)


def test_the_program_for_several_gpus(tmp_path):
    losses = [float(line.split()[-1]) for line in run_twice(tmp_path, "data_parallel.py").splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]


def test_the_program_with_dtensors(tmp_path):
    assert run_twice(tmp_path, "tensor_parallel.py") == "(Shard(dim=2),) (2, 512, 16, 64) (Shard(dim=2),)\n"


@pytest.mark.parametrize("head_dim", [1, 16, 20, 100])
def test_padding_by_hand_is_exact(head_dim):
    (text,) = [block for block in blocks(ROOT / "docs" / "head-dims.md", "python") if "def padded_attention" in block]
    names = {}
    exec(text, names)
    q, k, v = (torch.randn(2, 9, heads, head_dim, dtype=torch.float64) for heads in (4, 2, 2))
    out = names["padded_attention"](q, k, v, causal=True)
    torch.testing.assert_close(out, flash_attn_ext.flash_attn_func(q, k, v, causal=True))


def test_a_snippet_stands_in_one_place():
    places = {}
    for path in DOCUMENTS:
        for line in {line.strip() for block in blocks(path, "python") for line in block.splitlines()}:
            if len(line) > 60:
                places.setdefault(line, []).append(path.name)
    assert places and not {line: where for line, where in places.items() if len(where) > 1}


def test_the_reference_names_nothing_private():
    text = (ROOT / "docs" / "api.md").read_text()
    assert "flash_attn_ext.forward" in text and not re.findall(r"_C\b|set_test_faults", text)


def test_the_first_screen_says_for_whom_it_is():
    screen = README.read_text().split("## Quick start")[0]
    assert len(screen.splitlines()) < 40
    today, missing = screen.split("**Not yet**")
    coming, not_soon = missing.split("**Not soon**")
    assert all(peer in today for peer in ("FlashAttention-3", "cuDNN", "FlexAttention"))
    assert re.search(r"^\| H[12]00, ", today, re.MULTILINE)
    assert "every head dim that is a multiple of 8" in " ".join(today.split()) and "libraries" in coming
    for name in ("KV caches", "decoding", "paged", "FP8", "dropout", "biases", "masks", "other GPUs"):
        assert name in not_soon


def test_the_limits_name_all_that_is_refused_and_what_is_coming():
    section = README.read_text().split("## Limits")[1].split("\n## ")[0]
    needed = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    for name, keyword in keywords.KEYWORDS.items():
        if "use " in keyword.way_out:  # it asks for something that there is elsewhere
            (row,) = [row for row in needed if f"`{name}" in row]
            assert "(coming)" not in row, row
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        assert hasattr(flash_attn_ext, name) != any(f"`{name}`" in row for row in needed)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    def anchors(document):
        titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
