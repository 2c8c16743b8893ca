"""Whether a model's attention runs and trains on Hopper GPUs with the kernels built.

Give a config.json as Hugging Face writes it (or its directory, or - for standard input), the name of a model whose
config.json is in the hub's local cache, or the shapes:

    python -m flash_attn_ext check path/to/config.json
    python -m flash_attn_ext check meta-llama/Llama-3.1-8B
    python -m flash_attn_ext check --hidden-size 3072 --num-heads 32

Exit code: 0 all of it runs and trains, 1 something does not or was not looked at, 2 the input cannot be read.
The answer is about the kernels of this version, and needs no GPU. It knows the configuration only: packed
sequences and KV caches are the matter of the code that calls attention.
"""

import argparse
import inspect
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import flash_attn_func, limits
from .._version import __version__
from . import show, table
from .models import Attention, Need, read
from .options import positive_int
from .values import Unreadable

# What flash_attn_func can do is what it takes as arguments, at the head dims where the kernels have that (limits.py).
ARGUMENTS = inspect.signature(flash_attn_func).parameters
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # MODEL or ORGANISATION/MODEL


@dataclass(frozen=True)
class WayOut:
    """A change with which an unsupported head dim runs."""

    change: str
    forward: bool
    backward: bool
    costs: str


@dataclass(frozen=True)
class Answer:
    """What one attention can do. The lists name what stops a pass; an empty one means that it runs."""

    attention: Attention
    stops_forward: list[str]
    stops_backward: list[str]
    shape_problems: list[str]
    needs: list[Need]  # those that are not built
    ways_out: list[WayOut]

    @property
    def runs(self) -> bool:
        return not self.stops_forward

    @property
    def trains(self) -> bool:
        return not self.stops_backward


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="config.json, its directory, a model's name on the hub, or -")
    shapes = parser.add_argument_group("shapes, in place of a file")
    shapes.add_argument("--hidden-size", type=positive_int, metavar="N", help="width of the model")
    shapes.add_argument("--num-heads", type=positive_int, metavar="N", help="query heads")
    shapes.add_argument("--num-kv-heads", type=positive_int, metavar="N", help="key and value heads (default: as many)")
    shapes.add_argument("--head-dim", type=positive_int, metavar="N", help="default: hidden size / heads")
    parser.add_argument(
        "--seqlen",
        type=positive_int,
        metavar="N",
        help="longest sequence that you will use: windows beyond it do not matter",
    )
    parser.add_argument("--json", action="store_true", help="the answer as JSON")


def run(options: argparse.Namespace) -> int:
    try:
        title, attentions = attentions_of(options)
        answers = [judge(attention) for attention in attentions]
    except (Unreadable, table.NoTable) as error:
        show.error(f"check: {error}")
        return 2
    if options.json:
        print(json.dumps(as_json(title, answers), indent=2))
    else:
        print_answers(title, answers)
    return 0 if all(answer.trains for answer in answers) and not not_looked_at(answers) else 1


# ---- input ----


def attentions_of(options: argparse.Namespace) -> tuple[str, list[Attention]]:
    """A title for the model, and its attentions."""
    given = {
        "hidden_size": options.hidden_size,
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": options.num_kv_heads,
        "head_dim": options.head_dim,
    }
    if options.config is None:
        if not (options.head_dim or options.hidden_size and options.num_heads):
            raise Unreadable("give a config.json, or --head-dim, or --hidden-size and --num-heads; --help says more")
        words = ("hidden size", "heads", "KV heads", "head dim")
        title = ", ".join(f"{word} {value}" for word, value in zip(words, given.values(), strict=True) if value)
        if options.num_heads:
            return title, read(given, options.seqlen)
        # A head dim alone: the answer is the same for any number of heads.
        (attention,) = read({**given, "num_attention_heads": options.num_kv_heads or 1}, options.seqlen)
        return title, [replace(attention, heads=None, kv_heads=options.num_kv_heads)]
    if any(given.values()):
        raise Unreadable("give a config.json or shapes, not both")
    path, name = find(options.config)
    title, config = name, load(path, name)
    if isinstance(config, dict):
        if path is None or name == str(path):  # nobody asked for it by its name
            title = str(config.get("_name_or_path") or name)
        if isinstance(config.get("model_type"), str):
            title += f" ({config['model_type']})"
    try:
        return title, read(config, options.seqlen)
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from None


def find(where: str) -> tuple[Path | None, str]:
    """The file (None: standard input), and what to call it."""
    if where == "-":
        return None, "standard input"
    path = Path(where)
    if path.is_dir():
        path = path / "config.json"
    elif not path.exists() and HUB_NAME.fullmatch(where) and path.suffix != ".json":
        path = of_the_hub(where)
        return path, f"{where}, from {path}"
    return path, str(path)


def load(path: Path | None, name: str) -> object:
    """The file's JSON."""
    try:
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
        text = content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise Unreadable(f"{name}: no such file") from None
    except UnicodeDecodeError:
        raise Unreadable(f"{name} is not text, and a config.json is") from None
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise Unreadable(f"{name} is nested too deeply for a model's configuration") from None
    except ValueError:
        raise Unreadable(f"{name} has a number of too many digits for Python to read") from None


def of_the_hub(model: str) -> Path:
    """The config.json of a model in the hub's local cache. Nothing is downloaded."""
    cache = hub_cache()
    folder = cache / f"models--{model.replace('/', '--')}"
    try:
        main = [folder / "snapshots" / (folder / "refs" / "main").read_text().strip() / "config.json"]
    except OSError:
        main = []
    newest = sorted(folder.glob("snapshots/*/config.json"), key=lambda path: path.lstat().st_mtime, reverse=True)
    for path in main + newest:
        if path.is_file():
            return path
    raise Unreadable(
        f"{model}: no such file, and no config.json of a model of that name in the hub's cache, {cache}. "
        f"Download it, and ask again: hf download {model} config.json"
    )


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    for name, below in (("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if value := os.environ.get(name):
            return Path(value).expanduser() / below
    return Path.home() / ".cache" / "huggingface" / "hub"


# ---- the answer ----


def judge(attention: Attention) -> Answer:
    dims = table.head_dims()
    runs, trains = dims["forward"], dims["backward"]
    d, dv = attention.head_dim, attention.head_dim_v
    problems, forward, backward = [], [], []
    if d is None:
        problems.append(
            f"hidden_size / heads = {attention.hidden_size} / {attention.heads} = "
            f"{attention.hidden_size / attention.heads:.4g} is not whole, and there is no head_dim"
        )
        forward.append("head dim")
    elif d != dv:
        problems.append(f"q and k have head dim {d} and v has {dv}; the kernels want one for all three")
        forward.append("head dims")
    elif d not in runs:
        problems.append(f"head dim {d} has no kernel; {limits.what_runs()}")
        forward.append("head dim")
    elif d not in trains:
        problems.append(f"head dim {d} runs, but has no backward kernel; {limits.in_words(trains)} trains")
        backward.append("head dim")
    ways_out = ways_out_of(attention, runs, trains) if forward + backward else []
    if attention.heads and attention.heads % attention.kv_heads != 0:
        problems.append(f"{attention.heads} heads are no multiple of {attention.kv_heads} KV heads")
        forward.append("KV heads")
    missing = {which: [n for n in attention.needs if not is_built(n, which, d, dims[which])] for which in dims}
    forward += [need.name for need in missing["forward"] if not need.only_training]
    backward = forward + backward + [need.name for need in missing["backward"] if need.name not in forward]
    needs = [need for need in attention.needs if need in missing["forward"] + missing["backward"]]
    return Answer(attention, forward, backward, problems, needs, ways_out)


def is_built(need: Need, which: str, head_dim: int | None, head_dims: list[int]) -> bool:
    """Whether the kernels of a pass have it: at this head dim, or at some where this one does not run as it is."""
    if need.argument not in limits.OPTIONS:
        return need.argument in ARGUMENTS
    return any(limits.has_option(need.argument, which, d) for d in ([head_dim] if head_dim in head_dims else head_dims))


def ways_out_of(attention: Attention, runs: list[int], trains: list[int]) -> list[WayOut]:
    """Best first; a change that gains nothing is left out."""
    d, dv = attention.head_dim, attention.head_dim_v
    ways = []
    if d is not None:
        already_runs = d == dv and d in runs
        targets = [min((t for t in dims if t >= max(d, dv)), default=None) for dims in (runs, trains)]
        for target in dict.fromkeys(targets):
            if target and not (already_runs and target not in trains):
                ways.append(pad(attention, target, target in trains))
    # The same width in heads of another size. MLA's projections are not split that way.
    width = attention.heads * d if attention.heads and d else attention.hidden_size
    if width and attention.heads and d == dv:
        useful = trains or ([] if d in runs else runs)
        filled = [row["head_dim"] for row in table.rows() if row["head_dim"] in useful]  # no multiplication by 0
        for target in sorted(filled, key=lambda t: abs(t - (d or width / attention.heads))):
            if width % target == 0 and target != d:
                ways.append(split_differently(attention, width // target, target, target in trains))
    sdpa = "torch's scaled_dot_product_attention"
    return [*ways, WayOut(sdpa, True, True, "slower; is_causal is aligned to the top left")]


def pad(attention: Attention, target: int, trains: bool) -> WayOut:
    d, dv = attention.head_dim, attention.head_dim_v
    more = 100 * (2 * limits.row_of(target)["head_dim"] / (d + dv) - 1)  # the kernels fill up to that
    what = f"{d} to {target}" if d == dv else f"q, k from {d} and v from {dv} to {target}"
    return WayOut(f"pad {what}", True, trains, f"{more:.0f} % more attention FLOPs, and memory for q, k, v, out")


def split_differently(attention: Attention, heads: int, head_dim: int, trains: bool) -> WayOut:
    group = attention.heads // attention.kv_heads if attention.heads % attention.kv_heads == 0 else 1
    kv_heads = heads // group if heads % group == 0 else heads
    of_kv = f" ({kv_heads} KV heads)" if kv_heads != heads else ""
    same = heads // kv_heads == group
    costs = "as many parameters and FLOPs" if same else "more KV heads: more parameters, a larger KV cache"
    return WayOut(f"a new model: {heads} heads{of_kv} of {head_dim}", True, trains, costs)


# ---- output ----


def not_looked_at(answers: list[Answer]) -> list[str]:
    return [what for answer in answers for what in answer.attention.not_looked_at]


def verdict(answers: list[Answer]) -> tuple[str, str]:
    """A sentence and its style."""
    whole = not not_looked_at(answers)
    it = "It" if whole else "What was looked at"
    if all(answer.trains for answer in answers):
        return f"{it} runs and trains.", "bold green" if whole else "bold yellow"
    if all(answer.runs for answer in answers):
        return f"{it} runs. It does not train as it is.", "bold yellow"
    some = any(answer.runs for answer in answers)
    return "Not all of it runs as it is." if some else "It does not run as it is.", "bold red"


def print_answers(title: str, answers: list[Answer]) -> None:
    show.say(f"{title}, on a Hopper GPU with flash_attn_ext {__version__}", "bold")
    rows = []
    for answer in answers:
        a = answer.attention
        head_dim = f"{a.head_dim}/{a.head_dim_v}" if a.head_dim != a.head_dim_v else str(a.head_dim or "-")
        shapes = [str(a.heads or "-"), str(a.kv_heads or "-"), head_dim]
        rows.append([a.part, *shapes, cell(answer.stops_forward), backward_cell(answer)])
    show.table(["part", ">heads", ">KV heads", ">head dim", "forward", "backward"], rows)
    for answer in answers:
        print_reasons(answer, f"{answer.attention.part}: " if len(answers) > 1 else "")
    for what in not_looked_at(answers):
        show.say(f"not looked at: {what}.", "yellow")
    show.say(*verdict(answers))


def print_reasons(answer: Answer, prefix: str) -> None:
    a = answer.attention
    for problem in answer.shape_problems:
        show.say(f"{prefix}{problem}.", "red")
    if answer.ways_out:
        rows = [[way.change, cell([not way.forward]), cell([not way.backward]), way.costs] for way in answer.ways_out]
        show.table(["way out", "forward", "backward", "costs"], rows)
    changes = " ".join(way.change for way in answer.ways_out)
    if "pad" in changes:
        cut = f" and keep out's first {a.head_dim_v} columns"
        show.say(f"  pad: with zeros; pass softmax_scale={a.softmax_scale or '(not known)'}{cut} (docs/head-dims.md).")
    if "new model" in changes:
        show.say("  a new model: weights that are trained cannot be split into other heads.")
    for need in answer.needs:
        show.say(f"{prefix}not built: {need.name}. {need.because}.", "yellow")
        if need.way_out:
            show.say(f"  way out: {need.way_out}.")
    for note in a.notes:
        show.say(f"{prefix}{note}.", "cyan")
    if answer.shape_problems or answer.needs or a.notes:
        show.say()


def cell(stops: list) -> str:
    """What stops a pass, by name or just by True."""
    names = [stop for stop in stops if isinstance(stop, str)]
    return f"no: {', '.join(names)}" if names else "no" if any(stops) else "yes"


def backward_cell(answer: Answer) -> str:
    """Where a switch of the configuration is all that stops the training, the kernels are there."""
    switches = [need.name for need in answer.needs if need.only_training]
    if switches and answer.stops_backward == switches:
        return f"yes, without {', '.join(switches)}"
    return cell(answer.stops_backward)


def as_json(title: str, answers: list[Answer]) -> dict:
    unknown = not_looked_at(answers)

    def known(yes: bool) -> bool | None:
        return None if yes and unknown else yes

    return {
        "flash_attn_ext": __version__,
        "model": title,
        "runs": known(all(answer.runs for answer in answers)),
        "trains": known(all(answer.trains for answer in answers)),
        "not_looked_at": unknown,
        "parts": [
            {
                "part": a.part,
                "heads": a.heads,
                "kv_heads": a.kv_heads,
                "head_dim": a.head_dim,
                "head_dim_v": a.head_dim_v,
                "softmax_scale": a.softmax_scale,
                "stops_forward": answer.stops_forward,
                "stops_backward": answer.stops_backward,
                "problems": answer.shape_problems,
                "ways_out": [asdict(way) for way in answer.ways_out],
                "not_built": [{"name": n.name, "because": n.because, "way_out": n.way_out} for n in answer.needs],
                "notes": list(a.notes),
            }
            for answer in answers
            for a in [answer.attention]
        ],
    }
