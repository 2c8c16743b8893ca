"""examples/train_gpt.py on the CPU: it learns, goes on after a stop as if nothing had been, refuses in clear words."""

import csv
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import flash_attn_ext

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_gpt.py"
TINY = (
    f"--device cpu --data {ROOT / 'tests'} --width 64 --layers 2 --seqlen 64 --batch 4 --steps 20 --lr 0.01 "
    "--report-every 2 --judge-every 10 --held-out 4 --sample 20"
).split()
# One thread: tiny products gain nothing from more, and on a busy machine threads wait for each other.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(flash_attn_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
CHECKOUT = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}  # where nothing is installed


@pytest.fixture(scope="module")
def run():
    """Calls the script's main() in this process, where torch is already imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(SCRIPT.parent))
    import train_gpt

    def run(folder, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *TINY, "--output", str(folder), *map(str, arguments)])
            train_gpt.main()

    yield run
    sys.path.remove(str(SCRIPT.parent))
    torch.set_num_threads(threads)


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curve(folder):
    """What does not depend on the clock."""
    return [(row["step"], row["loss"], row["held_out_loss"], row["learning_rate"]) for row in metrics(folder)]


def assert_same_losses(folder, other):
    for ours, theirs in zip(metrics(folder), metrics(other), strict=True):
        for field in ("loss", "held_out_loss"):
            assert float(ours[field] or 0) == pytest.approx(float(theirs[field] or 0), abs=2e-3)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "uninterrupted"
    run(folder)
    return folder


def test_it_learns(uninterrupted):
    rows = metrics(uninterrupted)
    held_out = [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]]
    assert [int(row["step"]) for row in rows] == list(range(0, 21, 2))
    assert held_out[0] > 5.3, "an untrained model knows nothing: ln 256 is 5.55"
    assert held_out[-1] < 4
    assert all(float(row["attention_share"]) > 0 for row in rows[5:])
    assert not list(uninterrupted.glob("*.new")), "a file was not put in place"


def test_resuming_is_as_if_never_stopped(run, uninterrupted, tmp_path, capsys):
    folder = tmp_path / "stopped"
    run(folder, "--stop-at", 7)  # between two reports
    assert "stopped after step 7 of 20" in capsys.readouterr().out
    # Rows from after the checkpoint, as a kill leaves them, and a half-written checkpoint beside the whole one.
    with (folder / "metrics.csv").open("a") as file:
        file.write("10,2560,9.9,9.9,0,0,0,0,0,0\n")
    (folder / "checkpoint.pt.new").write_bytes(b"half")
    run(folder, "--prompt", "def ")
    stdout = capsys.readouterr().out
    assert "goes on after step 7" in stdout
    assert "---- what it writes after 'def ' ----\ndef " in stdout and "held-out loss" in stdout
    assert curve(folder) == curve(uninterrupted)
    ours, theirs = (torch.load(path / "checkpoint.pt")["model"] for path in (folder, uninterrupted))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    run(folder)
    assert "complete already" in capsys.readouterr().out


def test_a_run_of_one_step(run, tmp_path, capsys):
    run(tmp_path, "--stop-at", 1)
    assert "stopped after step 1 of 20" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 1


def test_every_attention_sees_the_same(run, uninterrupted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "sdpa", "--attention", "sdpa", "--accumulate", 2)
    assert_same_losses(uninterrupted, tmp_path / "sdpa")
    run("-", "--plot-compare", uninterrupted, tmp_path / "sdpa" / "metrics.csv")
    assert "nats apart, over 3 points" in capsys.readouterr().out


# Packed documents -----------------------------------------------------------------------------------------------------


def padded(sequences, length, value):
    return torch.stack([F.pad(sequence, (0, length - len(sequence)), value=value) for sequence in sequences])


@pytest.mark.parametrize("attention", ["flash_attn_ext", "reference"])
def test_packed_documents_have_the_loss_of_padded_ones(run, attention):
    """And its gradients: what stands behind a document in a padded row is seen by no byte, and counts for nothing."""
    import train_gpt

    torch.manual_seed(0)
    shape = train_gpt.Shape(width=64, layers=2, head_dim=64, seqlen=60)
    model = train_gpt.GPT(shape, train_gpt.ATTENTIONS[attention])
    files = [torch.randint(1, 256, (length,)) for length in (7, 30, 1, 0, 100, 45, 90)]
    text = train_gpt.Text(torch.cat([F.pad(file, (1, 0)) for file in files]).to(torch.uint8), torch.device("cpu"))
    starts = torch.tensor([0, 3, 150, 200])
    tokens, targets, cu_seqlens = text.windows(starts, shape.seqlen, packed=True)
    lengths = cu_seqlens.diff().tolist()
    assert lengths == [8, 31, 2, 1, 18] + [5, 31, 2, 1, 21] + [39, 21] + [60]
    assert all(0 not in sequence[1:] for sequence in tokens.split(lengths)), "a byte of 0 begins a document"

    packed = model(tokens, targets, cu_seqlens)
    rows = padded(tokens.split(lengths), shape.seqlen, 0), padded(targets.split(lengths), shape.seqlen, -100)
    torch.testing.assert_close(packed, model(*rows), rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters) for loss in (packed, model(*rows))), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())

    crossing = model(*text.windows(starts, shape.seqlen, packed=False))
    assert (packed - crossing).abs() > 1e-4, "it makes a difference to see other documents"


def test_a_packed_run(run, uninterrupted, tmp_path, capsys):
    folder = tmp_path / "packed"
    run(folder, "--packed", "--accumulate", 2)
    assert "flash_attn_ext packed, head dim 64" in capsys.readouterr().out
    first, *_, last = metrics(folder)
    assert float(first["held_out_loss"]) > 5.3 and float(last["held_out_loss"]) < 4
    assert 0 < float(last["attention_tflops"]) and float(last["model_tflops"]) < float("inf")
    with pytest.raises(SystemExit):
        run(folder)
    assert "is of another run (text" in capsys.readouterr().err


def test_two_processes_compute_what_one_does(uninterrupted, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*torchrun, *TINY, "--parallel", "ddp", "--output", str(tmp_path / "two")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert_same_losses(uninterrupted, tmp_path / "two")


def endless(folder):
    """A run with a second between two reports, so that a signal comes while neither is written."""
    return [sys.executable, str(SCRIPT), *TINY, *"--steps 100000 --report-every 400 --output".split(), str(folder)]


def test_interrupt_leaves_a_checkpoint(tmp_path):
    process = subprocess.Popen(
        endless(tmp_path),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and "stopped after step" in stdout, stderr
    assert stdout.count("stopping at the next report") == 1
    assert torch.load(tmp_path / "checkpoint.pt")["step"] >= 400


def test_a_second_interrupt_leaves_the_terminal_its_cursor(tmp_path):
    pytest.importorskip("rich")
    hide, show = b"\x1b[?25l", b"\x1b[?25h"
    master, slave = pty.openpty()
    process = subprocess.Popen(endless(tmp_path), env=ENVIRONMENT | {"TERM": "xterm"}, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""

    def read_until(mark=None):
        nonlocal shown
        while mark is None or mark not in shown:
            try:
                shown += os.read(master, 4096)
            except OSError:  # the process has ended
                return

    for mark in (hide, b"stopping at the next report"):
        read_until(mark)
        process.send_signal(signal.SIGINT)
    read_until()
    os.close(master)
    assert process.wait() == 128 + signal.SIGINT
    assert shown.rindex(show) > shown.rindex(hide) and b"Traceback" not in shown, shown


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("examples/train_gpt.py --plot-compare nowhere", "Give the folders of runs"),
        ("benchmarks/train_step.py --layers 0", "argument --layers: '0' is not a whole number of at least 1"),
        ("benchmarks/train_step.py --seqlen -5", "argument --seqlen: '-5' is not a whole number of at least 1"),
    ],
)
def test_scripts_find_the_package_of_their_checkout(tmp_path, command, words):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *options], cwd=tmp_path, env=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_the_command_line_works_after_a_demo_without_kernels(tmp_path):
    for name in ("Makefile", "csrc/limits.h", "examples", "flash_attn_ext", "tools"):
        if (ROOT / name).is_dir():
            generated = shutil.ignore_patterns("__pycache__", "_C.*", "_build_info.py", "_limits_table.py")
            shutil.copytree(ROOT / name, tmp_path / name, ignore=generated)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    for command in (
        ["make", "demo", "ENV=current", f"PYTHON3={sys.executable}", "DEMO=--help"],
        [sys.executable, "-m", "flash_attn_ext", "check", "--hidden-size", "2048", "--num-heads", "32"],
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=CHECKOUT | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_texts(run, tmp_path):
    from training_run import load_text

    train, held_out = load_text(None)
    assert len(train) > 2e6 and 0.01 < len(held_out) / len(train) < 0.2, "the standard library is everywhere"
    (tmp_path / "one.txt").write_text("abc" * 100)
    train, held_out = load_text(tmp_path / "one.txt")
    assert bytes(train.tolist())[1:] + bytes(held_out.tolist())[1:] == b"abc" * 100
    (tmp_path / "two.txt").write_text("xyz" * 100)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    train, held_out = load_text(tmp_path)
    assert bytes(train.tolist()) == b"\0" + b"abc" * 100 and bytes(held_out.tolist()) == b"\0" + b"xyz" * 100


@pytest.mark.parametrize(("size", "words"), [(300, "0.3 kB"), (12_345, "12.3 kB"), (9_876_543, "9.9 MB")])
def test_small_texts_have_a_size_too(run, size, words):
    from train_gpt import amount

    assert amount(torch.empty(size, dtype=torch.uint8)) == words


def test_a_prompt_may_be_any_bytes(run, uninterrupted, capsys):
    run(uninterrupted, "--prompt", os.fsdecode(b"\xff"))
    assert r"what it writes after '\udcff'" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [0, 10, 5000], ids=lambda kept: f"{kept}-bytes-kept")
def test_a_damaged_checkpoint(run, uninterrupted, tmp_path, capsys, kept):
    whole = (uninterrupted / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:kept])
    with pytest.raises(SystemExit) as exit:
        run(tmp_path)
    assert exit.value.code == 2 and "is damaged, or no checkpoint. --restart" in capsys.readouterr().err
    run(tmp_path, "--restart", "--stop-at", 2)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 2


HEADER = "step,tokens,loss,held_out_loss\n"


def test_comparing_files_of_one_folder(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text(HEADER + "0,0,,5.5\n10,1000,3,3\n20,2000,2,2\n")
    (tmp_path / "b.csv").write_text(HEADER + "0,0,,5.5\n10,1000,3,2.97\n20,2000,2,2.01\n")
    run("-", "--plot-compare", "a.csv", "b.csv")
    stdout = capsys.readouterr().out
    assert "a.csv and b.csv: held-out losses at most 0.0300 nats apart, over 3 points; +0.50 % at the last" in stdout
    if "No picture" not in stdout:
        assert (tmp_path / "compare.png").stat().st_size > 0


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_every_line_of_a_picture_has_its_name(run, tmp_path, names):
    pytest.importorskip("matplotlib")
    from training_run import draw

    for name in names:
        (tmp_path / name).write_text(HEADER + "0,0,,5.5\n10,1000,3,3\n20,2000,2,2.5\n")
    curves, *differences = draw({name: tmp_path / name for name in names}).axes
    whose = [f"{name}: " if len(names) > 1 else "" for name in names]
    shown = [label for who in whose for label in (f"{who}held-out files, 2.500 at the end", f"{who}training")]
    for panel, labels in [(curves, shown), *((panel, names) for panel in differences)]:
        assert (
            len(panel.lines) == len(labels) == len({line.get_linestyle() + str(line.get_lw()) for line in panel.lines})
        )
        assert [text.get_text() for text in panel.get_legend().get_texts()] == labels


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "bad.csv is no metrics.csv of a run"),
        ("step,loss\n10,3\n", "bad.csv is no metrics.csv of a run"),
        (HEADER + "10,1000,three,3\n", "bad.csv is no metrics.csv of a run"),
        (HEADER + "10,777,3,3\n", "have no held-out loss at the same number of bytes"),
    ],
    ids=["empty", "columns", "words", "steps"],
)
def test_what_cannot_be_compared(run, uninterrupted, tmp_path, capsys, content, words):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(SystemExit) as exit:
        run("-", "--plot-compare", uninterrupted, tmp_path / "bad.csv")
    assert exit.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head-dim", "96"], "argument --head-dim: invalid choice: "),
        (["--data", "nowhere"], "--data nowhere: there is no such file or folder"),
        (["--batch", "4", "--accumulate", "3"], "must be a multiple of 3"),
        (["--parallel", "ddp"], "torchrun --nproc-per-node"),
        (["--seqlen", "1000000"], "The text is too short"),
        (["--lr", "0"], "--lr is 0.0; it must be greater than 0"),
        (["--width", "65"], "--width is 65; it must be a multiple of 64, as every --head-dim is: 64 or 128."),
        (["--stop-at", "0"], "--stop-at is 0; it must be greater than 0"),
        (["--lr", "nan"], "--lr is nan; it must be greater than 0, and finite"),
        (["--data", "/proc/self/mem"], "--data: /proc/self/mem cannot be read (Input/output error)"),
        (["--output", str(SCRIPT)], "this folder cannot be made (File exists)"),
        (["--output", "/proc/nowhere"], "--output /proc/nowhere: this folder cannot be made"),
        (["--attention", "sdpa"], "is of another run (attention flash_attn_ext, not sdpa)"),
        (["--plot-compare", "nowhere"], "Give the folders of runs"),
        (["--packed", "--attention", "sdpa"], "sdpa takes no packed documents. --attention flash_attn_ext or"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_wrong_options(run, uninterrupted, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        run(uninterrupted, *arguments)
    assert exit.value.code == 2 and words in capsys.readouterr().err
