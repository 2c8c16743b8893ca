"""What surrounds the training in train_gpt.py: its text, its folder on disk, its pictures and its progress display."""

from __future__ import annotations

import csv
import math
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETWEEN_FILES = b"\0"  # a byte that no text contains


def refuse(text: str) -> NoReturn:
    """Ends the program; under torchrun one of the processes says why."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train_gpt.py: {text}", file=sys.stderr)
    sys.exit(2)


# ---- text ----


def files_of(folder: Path, left_out: frozenset[str] = frozenset()) -> list[Path]:
    """In an order that is the same on every machine, without what is hidden and without the folders of these names.

    Only regular files: a link that leads nowhere has no text, and a pipe might never end.
    """
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = (name for name in folders if not name.startswith(".") and name not in left_out)
        found += (Path(place, name) for name in files if not name.startswith("."))
    return sorted(filter(Path.is_file, found), key=lambda file: file.relative_to(folder).as_posix())


def standard_library() -> list[Path]:
    """The source of Python's standard library, which is wherever Python is."""
    # Tests are not installed everywhere, encodings/ is tables, and other people's packages may lie in the same folder.
    left_out = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"))
    return [file for file in files_of(Path(sysconfig.get_path("stdlib")), left_out) if file.suffix == ".py"]


def load_text(path: Path | None) -> tuple[Tensor, Tensor]:
    """The bytes to train on, and those to judge it by: every twentieth file, or the end of a single one."""
    if path is not None and not path.exists():
        refuse(f"--data {path}: there is no such file or folder.")
    files = standard_library() if path is None else [path] if path.is_file() else files_of(path)
    texts = [text for text in map(_read, files) if text and BETWEEN_FILES not in text]
    if not texts:
        refuse(f"No text in {path or sysconfig.get_path('stdlib')}. --data takes a file, or a folder of text files.")
    if len(texts) == 1:
        cut = len(texts[0]) * 19 // 20
        texts = [texts[0][:cut], texts[0][cut:]]
    held_out = set(range(10, len(texts), 20)) or {len(texts) - 1}
    train = [text for index, text in enumerate(texts) if index not in held_out]
    return _join(train), _join([texts[index] for index in sorted(held_out)])


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        refuse(f"--data: {file} cannot be read ({error.strerror}).")


def _join(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(BETWEEN_FILES + text for text in texts)), dtype=torch.uint8)


# ---- the folder of a run ----


class RunFolder:
    """metrics.csv, loss.png and checkpoint.pt. Files are replaced whole, so that a kill never leaves half of one."""

    FIELDS = (
        "step tokens loss held_out_loss learning_rate tokens_per_second attention_share attention_tflops model_tflops "
        "seconds"
    ).split()

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.metrics, self.checkpoint = path / "metrics.csv", path / "checkpoint.pt"
        if writes:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                refuse(f"--output {path}: this folder cannot be made ({error.strerror}).")
            if not os.access(path, os.W_OK):
                refuse(f"--output {path}: nothing can be written into this folder.")

    def add(self, row: dict) -> None:
        if self.writes:
            with self.metrics.open("a", newline="") as file:
                csv.DictWriter(file, self.FIELDS).writerow(row)

    def begin_after(self, step: int) -> None:
        """Starts metrics.csv. Rows from after the checkpoint are dropped, they will come again."""
        if not self.writes:
            return
        if step == 0:
            self.checkpoint.unlink(missing_ok=True)
        rows = read_metrics(self.metrics) if step and self.metrics.exists() else []
        with _new(self.metrics).open("w", newline="") as file:
            writer = csv.DictWriter(file, self.FIELDS)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= step)
        os.replace(_new(self.metrics), self.metrics)

    def last_held_out_loss(self) -> float:
        rows = read_metrics(self.metrics) if self.metrics.exists() else []
        return next((float(row["held_out_loss"]) for row in reversed(rows) if row["held_out_loss"]), math.nan)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        # Whole tensors under plain names: the checkpoint of eight GPUs loads on one, and the other way round.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer, options=options)
        if self.writes:
            with _new(self.checkpoint).open("wb") as file:
                torch.save({"model": weights, "optimizer": state, **facts}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(_new(self.checkpoint), self.checkpoint)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict) -> tuple[int, float, list[float]]:
        """Fills model and optimizer. Returns the checkpoint's step and seconds, and the losses that are not yet in
        metrics.csv; 0, 0 and none where there is no checkpoint."""
        if not self.checkpoint.exists():
            return 0, 0.0, []
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            other = saved["run"]
        except Exception:  # its type depends on the place of the damage
            refuse(f"{self.checkpoint} cannot be read: it is damaged, or no checkpoint. --restart begins anew.")
        if differing := [f"{key} {other.get(key)}, not {run[key]}" for key in run if other.get(key) != run[key]]:
            refuse(
                f"{self.checkpoint} is of another run ({'; '.join(differing)}). "
                "Give this one a folder of its own with --output, or begin anew with --restart."
            )
        options = StateDictOptions(full_state_dict=True)
        weights, state = saved["model"], saved["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
        return saved["step"], saved["seconds"], saved.get("losses", [])  # older checkpoints have none


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- pictures ----


def losses(metrics: Path, column: str) -> dict[float, float]:
    """By million bytes read. Rows between two looks at the held-out text have no loss of it."""
    return {int(row["tokens"]) / 1e6: float(row[column]) for row in read_metrics(metrics) if row[column]}


def differences(curve: dict[float, float], first: dict[float, float]) -> dict[float, float]:
    """By how many per cent a curve is above the first, where both have a point."""
    return {x: 100 * (loss / first[x] - 1) for x, loss in curve.items() if first.get(x)}


def plot(runs: dict[str, Path], image: Path) -> bool:
    """Writes the picture of these runs. False where there is no matplotlib."""
    try:
        figure = draw(runs)
    except ImportError:
        return False
    figure.savefig(_new(image), dpi=150, format="png")
    os.replace(_new(image), image)
    return True


def draw(runs: dict[str, Path]) -> Figure:
    """Loss over bytes read, from the metrics.csv of each named run; of several, how far they are from the first too."""
    from matplotlib.figure import Figure

    names, count = list(runs), min(2, len(runs))
    alone = count == 1
    figure = Figure(figsize=(8, 4.5 if alone else 6.5), layout="constrained")
    panels = figure.subplots(count, squeeze=False, sharex=True, height_ratios=(5, 3)[:count])
    upper, lower = panels[0, 0], panels[-1, 0]
    dashes = ["-", "--", ":", "-."]  # curves that agree lie on each other, and each should show
    first, top, reach = {}, 0.0, 1.5
    for index, name in enumerate(names):
        train, held_out = (losses(runs[name], column) for column in ("loss", "held_out_loss"))
        style = dict(linestyle=dashes[index % 4], color=f"C{index}")
        last = next(reversed(held_out.values()), math.nan)
        whose = "" if alone else f"{name}: "
        upper.plot(*_points(held_out), **style, lw=2, label=f"{whose}held-out files, {last:.3f} at the end")
        upper.plot(*_points(train), **style, lw=1, alpha=0.5, label=f"{whose}training")
        top = max(top, *held_out.values(), 0.0)
        first = first or held_out
        if not alone:
            apart = differences(held_out, first)
            lower.plot(*_points(apart), **style, lw=2, label=name)
            reach = max(reach, *map(abs, apart.values()), 0.0)
    upper.set(ylabel="loss, nats per byte", ylim=(0, 1.05 * top or None))
    upper.set_title(names[0] if alone else "loss", fontsize="medium")
    if not alone:
        lower.axhspan(-1, 1, color="black", alpha=0.08, lw=0)
        lower.set(ylabel="difference, %", ylim=(-1.1 * reach, 1.1 * reach))
        lower.set_title(f"held-out loss, difference to {names[0]}; grey: up to 1 %", fontsize="medium")
    lower.set_xlabel("million bytes read")
    for panel in panels.flat:
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _points(curve: dict[float, float]) -> tuple[list[float], list[float]]:
    return list(curve), list(curve.values())


def compare(paths: list[Path], image: Path) -> None:
    """One picture of several runs, and how far apart their held-out losses are."""
    places = {}
    for path in paths:
        file = path / "metrics.csv" if path.is_dir() else path
        if not file.is_file():
            refuse(f"--plot-compare {path}: there is no {file}. Give the folders of runs, or their metrics.csv.")
        # A run is known by its folder; files of other names may lie in one folder.
        places[(file.parent if file.name == "metrics.csv" else file).resolve()] = file
    above = os.path.commonpath(place.parent for place in places)
    runs = {os.path.relpath(place, above): file for place, file in places.items()}
    curves = {}
    for name, file in runs.items():
        try:
            curves[name] = losses(file, "loss") and losses(file, "held_out_loss")
        except (KeyError, TypeError, ValueError, csv.Error):
            curves[name] = {}
        if not curves[name]:
            refuse(f"--plot-compare: {file} is no metrics.csv of a run, or has no losses yet.")
    first, *others = curves
    for name in others:
        apart = differences(curves[name], curves[first])
        if not apart:
            refuse(f"--plot-compare: {runs[first]} and {runs[name]} have no held-out loss at the same number of bytes.")
        nats = max(abs(curves[name][x] - curves[first][x]) for x in apart)
        last = apart[max(apart)]
        print(
            f"{first} and {name}: held-out losses at most {nats:.4f} nats apart, over {len(apart)} points; "
            f"{last:+.2f} % at the last"
        )
    print(f"wrote {image}" if plot(runs, image) else "No picture: matplotlib is not installed.")


# ---- progress ----


class Display:
    """A bar with a line under it where there are a terminal and rich, else lines of text."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.steps, self.shown, self.live, self.announced = steps, shown, None, ""
        self.terminal = sys.stdout.isatty()
        if not (shown and self.terminal):
            return
        try:
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn
        except ImportError:
            return
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"), BarColumn(48), TextColumn("{task.fields[left]}")
        )
        self.task = self.bar.add_task("", total=steps, left="")
        self.live = Live(self.bar, auto_refresh=False)  # no thread that draws while kernels are launched

    def update(self, step: int, words: str, seconds_left: float, lasting: bool) -> None:
        """A lasting line stays on the screen; a log, which is no terminal, gets no others."""
        left = f"{seconds_left // 60:.0f}:{seconds_left % 60:02.0f} left"
        if self.live:
            from rich.console import Group
            from rich.text import Text

            self.live.start()
            self.bar.update(self.task, completed=step, left=left)
            self.live.update(Group(self.bar, Text(words)), refresh=True)
        elif self.shown and (lasting or self.terminal):
            line = f"step {step}/{self.steps}  {words}  {left}"
            if self.terminal:
                columns = shutil.get_terminal_size().columns - 1
                line = "\r" + line[:columns].ljust(columns)
            print(line, end="\n" if lasting else "", flush=True)

    def announce(self, text: str) -> None:
        """A line of its own that stays on the screen, once however often it is announced."""
        if not self.shown or text == self.announced:
            return
        self.announced = text
        if self.live:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(f"\n{text}" if self.terminal else text, flush=True)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error) -> None:
        if self.live:
            self.live.stop()
