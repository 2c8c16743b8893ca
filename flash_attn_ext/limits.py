"""What runs: the table of head dims, dtypes, devices. Why a call does not run is said by refusals.py.

The table is csrc/limits.h, read through the compiled module; an installation without that module has it as setup.py
wrote it down. CPU tensors may have any head dimension, and nobody looks at the table for them.
"""

from collections.abc import Iterable

import torch

from ._binary import _C, why_missing


def _table() -> list[dict]:
    if _C:
        return _C.limits()
    try:
        from ._limits_table import TABLE
    except ModuleNotFoundError:
        return []  # the folder of the sources, where setup.py never ran
    return TABLE


TABLE = _table()

# The rows whose kernels have an option, by the pass and the argument that asks for it; elsewhere such a call is refused
# before a launch. A row goes by its largest head dim. Which calls need not ask this table: csrc/torch/checks.h.
EVERY = tuple(row["head_dim"] for row in TABLE)
OPTIONS = {
    "window_size": {"forward": EVERY, "backward": EVERY},
    "softcap": {"forward": EVERY, "backward": EVERY},
    "sinks": {"forward": EVERY, "backward": EVERY},
    "cu_seqlens": {"forward": EVERY, "backward": EVERY},
    "seqused": {"forward": EVERY, "backward": EVERY},
    "dlse": {"backward": EVERY},  # a gradient that flows into lse
}

GPU_DTYPES = (torch.float16, torch.bfloat16)
CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts


def supported() -> dict[str, tuple[int, ...]]:
    """Head dimensions that run on a Hopper GPU ("forward") and that train there ("backward"), in order.

    The same in every installation, on a laptop too; `is_available` tells whether the kernels run here. CPU tensors may
    have any head dimension.
    """
    return {which: head_dims(row for row in TABLE if row[which]) for which in ("forward", "backward")}


def row_of(head_dim: int) -> dict | None:
    """The row of the table on whose kernels the head dim runs, or None."""
    for row in TABLE:
        if row["smallest"] <= head_dim <= row["head_dim"]:
            return row if head_dim % row["step"] == 0 else None
    return None


def head_dims(rows: Iterable[dict]) -> tuple[int, ...]:
    """The head dims of these rows of the table."""
    return tuple(dim for row in rows for dim in range(row["smallest"], row["head_dim"] + 1, row["step"]))


def has_pass(which: str, head_dim: int) -> bool:
    """Whether there are GPU kernels of a pass ("forward", "backward") at this head dim."""
    row = row_of(head_dim)
    return row is not None and bool(row[which])


def has_option(option: str, which: str, head_dim: int) -> bool:
    """Whether the GPU kernels of a pass ("forward", "backward") have the option at this head dim."""
    row = row_of(head_dim)
    return row is not None and row["head_dim"] in OPTIONS[option].get(which, EVERY)


def stretches(head_dims: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last of each stretch of head dims, in order, that leaves out none between them."""
    found = []
    for dim in head_dims:
        if found and dim == found[-1][1] + TABLE[0]["step"]:
            found[-1] = found[-1][0], dim
        else:
            found.append((dim, dim))
    return found


def in_words(head_dims: Iterable[int]) -> str:
    """For a sentence: "every multiple of 8 from 8 to 256"; "none" of none."""
    named = " and ".join(f"from {first} to {last}" for first, last in stretches(head_dims))
    return f"every multiple of {TABLE[0]['step']} {named}" if named else "none"


def what_runs() -> str:
    """The head dims of both passes, as a clause: "every multiple of 8 from 8 to 256 runs and trains"."""
    runs, trains = supported().values()
    return f"{in_words(runs)} runs and {'' if runs == trains else in_words(trains) + ' '}trains"


def is_available(device: torch.device | str | int | None = None) -> bool:
    """Whether the kernels run on this CUDA device (default: the current one): they are built, and it is a Hopper."""
    return why_unavailable(device) is None


def why_unavailable(device: torch.device | str | int | None = None) -> str | None:
    """Why the kernels do not run on this CUDA device (default: the current one), or None if they do."""
    if device is not None:
        device = torch.device(device)
        if device.type != "cuda":
            return f"the GPU kernels run on CUDA devices, and this is {device}."
    if _C is None:
        return f"flash_attn_ext cannot run on CUDA tensors: {why_missing}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device."
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    if index >= torch.cuda.device_count():
        return f"there is no cuda:{index}; torch finds {torch.cuda.device_count()} CUDA device(s)."
    capability = _C.compute_capability(index)
    if capability != 90:
        return (
            f"flash_attn_ext needs a Hopper GPU (compute capability 9.0: H100, H200, GH200); cuda:{index} is "
            f"{torch.cuda.get_device_name(index)}, compute capability {capability // 10}.{capability % 10}. "
            "Use torch.nn.functional.scaled_dot_product_attention there."
        )
    return None
