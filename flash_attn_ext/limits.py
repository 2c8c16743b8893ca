"""What runs and what does not: the table of the compiled module, and the words for every refusal.

The table is csrc/limits.h, read through the compiled module. An installation without that module has an empty table.
CPU tensors go to the reference, which takes any head dimension and does not look at the table.
"""

import torch

from ._binary import _C, why_missing

TABLE: list[dict] = _C.limits() if _C else []
GPU_DTYPES = (torch.float16, torch.bfloat16)
AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts
FLOAT32 = torch.finfo(torch.float32)
CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NO_SECOND_DERIVATIVE = (
    "attention is once_differentiable: the gradients of flash_attn_func cannot be differentiated again. Ways out: do "
    "without create_graph=True, detach these gradients, or use attention_reference, which has every derivative."
)


def supported() -> dict[str, tuple[int, ...]]:
    """Head dimensions that run on the GPU ("forward") and that train there ("backward").

    Both are empty where the package was installed without its GPU kernels. CPU tensors may have any head dimension.
    """
    return {which: tuple(row["head_dim"] for row in TABLE if row[which]) for which in ("forward", "backward")}


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


def explain(q, k, v, softmax_scale=None, causal=False) -> str | None:
    """Why `flash_attn_func` would refuse this call, or None if it would run. Makes no call.

    The text names the argument, its value, what is accepted, and the way out. Where grad mode is on, gradients that the
    inputs require count too.
    """
    refusal = _refusal(q, k, v, softmax_scale, causal)
    if refusal is None and torch.is_grad_enabled():
        refusal = _gradient_refusal(q, k, v)
    return str(refusal) if refusal else None


def check(q, k, v, softmax_scale=None, causal=False, *, on_device: bool = True) -> None:
    """Raises TypeError, ValueError or RuntimeError with the text of `explain` if the call cannot run.

    on_device=False leaves out whether kernels and GPU are there, for fake tensors, which need neither.
    Gradients are not looked at: `check_gradient` does that.
    """
    if refusal := _refusal(q, k, v, softmax_scale, causal, on_device):
        raise refusal


def check_arguments(softmax_scale=None, causal=False, **tensors) -> None:
    """The part of `check` that needs no tensor's properties: the arguments' Python types, and softmax_scale."""
    if refusal := _type_refusal(tensors, softmax_scale, causal) or _scale_refusal(softmax_scale):
        raise refusal


def check_gradient(q, k, v, softmax_scale=None, causal=False) -> None:
    """Raises ValueError if an input requires grad and no kernel computes its gradient.

    Says nothing of calls that `check` refuses: their turn comes when they run.
    """
    on_device = not torch._C._dispatch_keys(q).has(torch._C.DispatchKey.Python)  # not a fake tensor
    if _refusal(q, k, v, softmax_scale, causal, on_device) is None and (refusal := _gradient_refusal(q, k, v)):
        raise refusal


def check_forward_mode(q, k, v) -> None:
    """Raises NotImplementedError if an input is a dual tensor: its tangent would vanish silently."""
    if any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in (q, k, v)):
        raise NotImplementedError(
            "flash_attn_func has no forward-mode derivative (jvp). Use attention_reference, which has one, or reverse "
            "mode: torch.autograd.grad."
        )


def check_backward(dout, q, k, v, out, lse, softmax_scale=None, causal=False, *, on_device: bool = True) -> None:
    """`check` for a call of `backward`."""
    refusal = (
        _refusal(q, k, v, softmax_scale, causal, on_device, autocast=False)
        or (q.device.type == "cuda" and _no_backward_refusal(q.shape[3], "Ways out: "))
        or _results_refusal(dout, q, out, lse)
    )
    if refusal:
        raise refusal


def _refusal(q, k, v, softmax_scale, causal, on_device=True, autocast=True) -> Exception | None:
    return (
        _type_refusal({"q": q, "k": k, "v": v}, softmax_scale, causal)
        or _scale_refusal(softmax_scale)
        or _shape_refusal(q, k, v)
        or _device_refusal(q, k, v, on_device, autocast)
    )


def _type_refusal(tensors, softmax_scale, causal) -> TypeError | None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            return TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__} ({value!r:.60}).")
    if softmax_scale is not None and (
        isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float | torch.SymInt | torch.SymFloat)
    ):
        return TypeError(
            f"softmax_scale must be a float or None, not {type(softmax_scale).__name__}. "
            "A tensor would have to be read back from the device: pass float(scale)."
        )
    if not isinstance(causal, bool):
        return TypeError(f"causal must be True or False, not {type(causal).__name__} ({causal!r:.60}).")
    return None


def _shape_refusal(q, k, v) -> ValueError | None:
    for name, tensor, heads in (("q", q, "heads"), ("k", k, "kv_heads"), ("v", v, "kv_heads")):
        if tensor.dim() != 4:
            return ValueError(
                f"{name} has {tensor.dim()} dimensions, shape {_shape(tensor)}; it must have 4: "
                f"(batch, seqlen, {heads}, head_dim). A single sequence: {name}.unsqueeze(0)."
            )
    batch, _, heads, head_dim = q.shape
    if k.shape[0] != batch or v.shape[0] != batch:
        return ValueError(f"q, k and v have batch sizes {batch}, {k.shape[0]} and {v.shape[0]}; they must be equal.")
    if k.shape[1] != v.shape[1]:
        return ValueError(f"k has seqlen {k.shape[1]} but v has {v.shape[1]}; they must be equal.")
    if k.shape[2] != v.shape[2]:
        return ValueError(f"k has {k.shape[2]} heads but v has {v.shape[2]}; they must be equal.")
    if k.shape[3] != head_dim or v.shape[3] != head_dim:
        return ValueError(
            f"q, k and v have head_dim {head_dim}, {k.shape[3]} and {v.shape[3]}; they must be equal. "
            "A smaller one can be padded with zeros: torch.nn.functional.pad(v, (0, n)), then out[..., :-n]."
        )
    if head_dim == 0:
        return ValueError("q, k and v have head_dim 0; it must be at least 1.")
    if k.shape[2] == 0:
        return ValueError(f"k and v have 0 heads, shape {_shape(k)}; they must have at least 1.")
    if heads % k.shape[2] != 0:
        return ValueError(
            f"q has {heads} heads and k, v have {k.shape[2]}: the first must be a multiple of the second, so that each "
            "group of query heads shares one key and value head. Check num_heads and num_key_value_heads of the model."
        )
    return None


def _scale_refusal(softmax_scale) -> ValueError | None:
    # The kernels compute with a float32. NaN is out of its range as well.
    if softmax_scale is not None and not FLOAT32.tiny <= softmax_scale <= FLOAT32.max:
        return ValueError(
            f"softmax_scale is {softmax_scale}; it must be finite and greater than 0, in the range of a float32 "
            "(default: 1/sqrt(head_dim)). The fourth argument of flash_attn_func is the scale; there is no dropout_p."
        )
    return None


def _device_refusal(q, k, v, on_device: bool, autocast: bool) -> Exception | None:
    if not q.device == k.device == v.device:
        return ValueError(f"q, k and v are on {q.device}, {k.device} and {v.device}; they must be on one device.")
    dtypes = [_dtype_after_autocast(tensor) if autocast else tensor.dtype for tensor in (q, k, v)]
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        return ValueError(
            "q, k and v have dtypes {}, {} and {}; they must be equal. Cast them, or call under torch.autocast.".format(
                *map(_name, dtypes)
            )
        )
    on_gpu = q.device.type == "cuda"
    accepted = GPU_DTYPES if on_gpu else CPU_DTYPES
    if dtypes[0] not in accepted:
        return ValueError(
            f"q, k and v are {_name(dtypes[0])}; on {q.device.type} they must be {_list(map(_name, accepted))}. "
            "Cast them (q.to(torch.bfloat16)), or call under torch.autocast."
        )
    if not on_gpu:
        return None
    if on_device and (reason := why_unavailable(q.device)):
        return RuntimeError(reason)
    return _head_dim_refusal(q.shape[3])


def _head_dim_refusal(head_dim: int) -> ValueError | None:
    runs = supported()["forward"]
    if not TABLE or head_dim in runs:
        return None
    larger = [dim for dim in runs if dim > head_dim]
    padding = f"pad q, k and v with zeros to {larger[0]} and pass softmax_scale={head_dim}**-0.5, or " if larger else ""
    return ValueError(
        f"head_dim is {head_dim}; the GPU kernels are built for head_dim {_list(runs)}. Ways out: {padding}"
        "choose the model's number of heads so that hidden_size / num_heads is one of these."
    )


def _gradient_refusal(q, k, v) -> ValueError | None:
    wanted = [name for name, tensor in (("q", q), ("k", k), ("v", v)) if tensor.requires_grad]
    if not wanted or q.device.type != "cuda":
        return None
    require = "requires" if len(wanted) == 1 else "require"
    return _no_backward_refusal(
        q.shape[3],
        "Ways out: call under torch.no_grad() or detach the inputs, ",
        f"{_list(wanted, 'and')} {require} grad, and ",
    )


def _no_backward_refusal(head_dim: int, ways_out: str, why: str = "") -> ValueError | None:
    trains = supported()["backward"]
    if not TABLE or head_dim in trains:
        return None
    if any(dim > head_dim for dim in trains):
        ways_out += "pad the head_dim with zeros to one that trains, "
    if trains:
        ways_out += "change the model's number of heads, "
    return ValueError(
        f"{why}head_dim {head_dim} has no backward kernel; head dimensions that train: "
        f"{_list(trains) if trains else 'none in this version'}. {ways_out}"
        "or train with torch.nn.functional.scaled_dot_product_attention."
    )


def _results_refusal(dout, q, out, lse) -> ValueError | None:
    """What the backward is given besides the inputs of the forward."""
    batch, seqlen_q, heads, _ = q.shape
    for name, tensor in (("dout", dout), ("out", out)):
        if tensor.shape != q.shape:
            return ValueError(
                f"{name} has shape {_shape(tensor)} and q {_shape(q)}; they must be equal: "
                "(batch, seqlen_q, heads, head_dim)."
            )
        if tensor.dtype != q.dtype:
            return ValueError(
                f"{name} is {_name(tensor.dtype)} and q {_name(q.dtype)}; they must be equal. "
                f"Cast it: {name}.to(q.dtype)."
            )
    if tuple(lse.shape) != (batch, heads, seqlen_q):
        return ValueError(
            f"lse has shape {_shape(lse)}; it must be (batch, heads, seqlen_q), here {(batch, heads, seqlen_q)}, as "
            "forward returns it."
        )
    if lse.dtype != torch.float32:
        return ValueError(
            f"lse is {_name(lse.dtype)}; it must be float32, as forward returns it. Cast it: lse.float()."
        )
    if not dout.device == out.device == lse.device == q.device:
        return ValueError(
            f"dout, out and lse are on {dout.device}, {out.device} and {lse.device}, and q is on {q.device}; they must "
            "be on one device."
        )
    return None


def _dtype_after_autocast(tensor: torch.Tensor) -> torch.dtype:
    device_type = tensor.device.type
    if tensor.dtype in AUTOCAST_DTYPES and torch.amp.is_autocast_available(device_type):
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(values, last: str = "or") -> str:
    *head, tail = map(str, values)
    return f"{', '.join(head)} {last} {tail}" if head else tail
