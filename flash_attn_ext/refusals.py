"""Why a call does not run: the words of every refusal but those of an option's value (options.py) and of other
functions' arguments (keywords.py).

The compiled module says yes by itself to a call that is plainly fine, and leaves every other one to the functions
`check*` here: they raise what is wrong, or return, and then the call goes on.
"""

import torch

from . import limits
from .options import Options, lse_shape
from .packed import spans

LARGEST_SIZE = 2**30 - 1  # the kernels count rows with an int, with room for one more round past the last

FLEX = "torch.nn.attention.flex_attention"
OF_OPTIONS = {  # where the kernels do not have them
    "window_size": f"use {FLEX}, or causal=True for (-1, 0)",
    "softcap": f"use {FLEX}",
    "sinks": "take return_lse=True and multiply out by sigmoid(lse - sink)",
    "cu_seqlens": "a call for each sequence, or under a causal mask padding on the right, which no earlier row sees",
    "seqused": "a call for each sequence, of what is used of it",
    "dlse": "use lse.detach() where it shall have no gradient (under torch.compile also where a compiled function "
    "returns it)",
}

NO_SECOND_DERIVATIVE = (
    "attention is once_differentiable: the gradients of flash_attn_func cannot be differentiated again. Ways out: do "
    "without create_graph=True, detach these gradients, or use attention_reference, which has every derivative."
)


def check(q, k, v, options: Options, *, on_device: bool = True) -> None:
    """Raises TypeError, ValueError or RuntimeError with the text of `explain` if the call cannot run.

    on_device=False leaves out whether kernels and GPU are there, for fake tensors, which need neither.
    Derivatives are not looked at: `check_derivatives` does that.
    """
    _raise(of_forward(q, k, v, options, on_device=on_device))


def check_backward(dout, q, k, v, out, lse, options: Options, dlse=None, *, on_device: bool = True) -> None:
    """`check` for a call of `backward`."""
    _raise(of_backward(dout, q, k, v, out, lse, options, dlse, on_device=on_device))


def check_arguments(options: Options, **tensors) -> None:
    """The part of `check` that needs no tensor's properties: the arguments' Python types, and the options' values."""
    _raise(_of_types(tensors | options.tensors()) or options.refusal())


def check_derivatives(q, k, v, options: Options) -> None:
    """Raises if an input is a dual tensor, or requires grad under torch.func or where no kernel computes its gradient.

    Says nothing of calls whose values `check` refuses: their turn comes when they run.
    """
    check_arguments(options, q=q, k=k, v=v)
    check_forward_mode(q, k, v, options)
    check_transforms(q, k, v, options)
    on_device = not torch._C._dispatch_keys(q).has(torch._C.DispatchKey.Python)  # not a fake tensor
    if torch.is_grad_enabled() and of_forward(q, k, v, options, on_device=on_device) is None:
        check_gradients(q, k, v, options)


def check_gradients(q, k, v, options: Options) -> None:
    """Raises if an input of a call in grad mode requires a gradient that no kernel computes."""
    _raise(of_gradients(q, k, v, options))


def check_transforms(q, k, v, options: Options) -> None:
    """Raises NotImplementedError if torch.func differentiates the call."""
    if torch.is_grad_enabled() and any(map(_is_differentiated, (q, k, v, *options.differentiable().values()))):
        raise NotImplementedError(
            "flash_attn_func cannot be differentiated by torch.func's transforms: grad, vjp, jacrev, hessian. Use "
            "torch.autograd.grad or backward(), for gradients of single samples in a loop over them, or "
            "attention_reference, which runs under every transform."
        )


def _is_differentiated(tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)  # under vmap
    return False


def check_forward_mode(q, k, v, options: Options) -> None:
    """Raises NotImplementedError if an input is a dual tensor: its tangent would vanish silently."""
    tensors = q, k, v, *options.differentiable().values()
    if any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "flash_attn_func has no forward-mode derivative (jvp). Use attention_reference, which has one, or reverse "
            "mode: torch.autograd.grad."
        )


def of_forward(
    q, k, v, options: Options, *, on_device: bool = True, autocast: bool = True, on_hopper: bool = False
) -> Exception | None:
    """What is wrong with a call of `forward`, or None. on_hopper: were the tensors on a Hopper GPU."""
    device_type = "cuda" if on_hopper else q.device.type if isinstance(q, torch.Tensor) else ""
    return (
        _of_types({"q": q, "k": k, "v": v} | options.tensors())
        or options.refusal()
        or _of_shapes(q, k, v, options)
        or _of_sinks(options.sinks, q)
        or _of_lengths(q, k, options)
        or _of_devices(q, k, v, options, device_type, on_device and not on_hopper, autocast)
        or (_no_option(options.asked(), "forward", q.shape[-1]) if device_type == "cuda" else None)
    )


def of_backward(dout, q, k, v, out, lse, options: Options, dlse=None, *, on_device: bool = True) -> Exception | None:
    """What is wrong with a call of `backward`, or None."""
    asked = options.asked() | ({"dlse": dlse} if dlse is not None else {})
    return (
        of_forward(q, k, v, options, on_device=on_device, autocast=False)
        or (_no_backward(q.shape[-1], "Ways out: ") if q.device.type == "cuda" else None)
        or _of_results(dout, q, out, lse, dlse)
        or (_no_option(asked, "backward", q.shape[-1]) if q.device.type == "cuda" else None)
    )


def of_gradients(q, k, v, options: Options, *, on_hopper: bool = False) -> ValueError | None:
    """What is wrong with the gradients that the inputs of a call require, were it made in grad mode; or None."""
    inputs = {"q": q, "k": k, "v": v} | options.differentiable()
    requiring = [name for name, tensor in inputs.items() if tensor.requires_grad]
    if not requiring or not (on_hopper or q.is_cuda):
        return None
    why = f"{_list(requiring, 'and')} {'requires' if len(requiring) == 1 else 'require'} grad, and "
    without = "call under torch.no_grad() or detach the inputs, "
    return _no_backward(q.shape[-1], f"Ways out: {without}", why) or _no_option(
        options.asked(), "backward", q.shape[-1], without, why
    )


def of_qkv(qkv, dims: int, num_heads_q: int | None) -> ValueError | None:
    """What is wrong with the shape of a packed qkv; dims: of one that has q, k and v in a dimension of their own."""
    first = "(batch, seqlen, " if dims == 5 else "(total, "
    if num_heads_q is None:
        if qkv.dim() == dims and qkv.shape[-3] == 3:
            return None
        return ValueError(
            f"qkv has shape {_shape(qkv)}; it must be {first}3, heads, head_dim), or with num_heads_q "
            f"{first}num_heads_q + 2 kv_heads, head_dim)."
        )
    rest = qkv.shape[-2] - num_heads_q if qkv.dim() == dims - 1 and num_heads_q > 0 else 0
    if rest > 0 and rest % 2 == 0:
        return None
    return ValueError(
        f"qkv has shape {_shape(qkv)}, and num_heads_q is {num_heads_q}; it must be {first}num_heads_q + 2 kv_heads, "
        "head_dim)."
    )


def _raise(refusal: Exception | None) -> None:
    if refusal:
        raise refusal


def _of_types(tensors) -> TypeError | None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            is_array = type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"
            shown = (
                f"a NumPy array. Convert it: torch.from_numpy({name})"
                if is_array
                else (f"{type(value).__name__} ({value!r:.60})")
            )
            return TypeError(f"{name} must be a torch.Tensor, not {shown}.")
        if value.is_nested:
            return TypeError(
                f"{name} is a nested tensor; it must have one length for the whole batch. Ways out: a call for each "
                f"sequence of {name}.unbind(), or torch.nn.functional.scaled_dot_product_attention."
            )
        if value.layout is not torch.strided:
            return TypeError(
                f"{name} has layout {value.layout}; it must be dense (torch.strided). Convert it: {name}.to_dense()."
            )
    return None


def _of_shapes(q, k, v, options: Options) -> ValueError | None:
    for name, tensor, heads in (("q", q, "heads"), ("k", k, "kv_heads"), ("v", v, "kv_heads")):
        side = "q" if name == "q" else "k"
        packed = getattr(options, f"cu_seqlens_{side}") is not None
        if packed and tensor.dim() != 3:
            return ValueError(
                f"{name} has {tensor.dim()} dimensions, shape {_shape(tensor)}; with cu_seqlens_{side} it must have 3: "
                f"(total_{side}, {heads}, head_dim). Sequences of one length: {name}.flatten(0, 1)."
            )
        if not packed and tensor.dim() != 4:
            return ValueError(
                f"{name} has {tensor.dim()} dimensions, shape {_shape(tensor)}; it must have 4: "
                f"(batch, seqlen, {heads}, head_dim). A single sequence: {name}.unsqueeze(0). Packed sequences: "
                f"flash_attn_varlen_func, with cu_seqlens_{side}."
            )
    heads, head_dim = q.shape[-2:]
    if k.dim() == 4:
        if k.shape[0] != v.shape[0] or (q.dim() == 4 and k.shape[0] != q.shape[0]):
            batches = [tensor.shape[0] for tensor in (q, k, v) if tensor.dim() == 4]
            names = "q, k and v" if q.dim() == 4 else "k and v"
            return ValueError(f"{names} have batch sizes {_list(batches, 'and')}; they must be equal.")
    if k.shape[-3] != v.shape[-3]:
        length = "seqlen" if k.dim() == 4 else "total_k"
        return ValueError(f"k has {length} {k.shape[-3]} but v has {v.shape[-3]}; they must be equal.")
    if k.shape[-2] != v.shape[-2]:
        return ValueError(f"k has {k.shape[-2]} heads but v has {v.shape[-2]}; they must be equal.")
    if k.shape[-1] != head_dim or v.shape[-1] != head_dim:
        return _of_head_dims(*(int(tensor.shape[-1]) for tensor in (q, k, v)), options)
    if head_dim == 0:
        return ValueError("q, k and v have head_dim 0; it must be at least 1.")
    if k.shape[-2] == 0:
        return ValueError(f"k and v have 0 heads, shape {_shape(k)}; they must have at least 1.")
    if heads % k.shape[-2] != 0:
        return ValueError(
            f"q has {heads} heads and k, v have {k.shape[-2]}: the first must be a multiple of the second, so that "
            "each group of query heads shares one key and value head. Check num_heads and num_key_value_heads of the "
            "model."
        )
    return None


def _of_head_dims(of_q: int, of_k: int, of_v: int, options: Options) -> ValueError:
    """Of those that differ."""
    if of_q != of_k:
        way_out = "Check how q and k are split into heads."
    elif of_v < of_q:
        way_out = f"Pad v with zeros: torch.nn.functional.pad(v, (0, {of_q - of_v})), and keep out[..., :{of_v}]."
    else:
        padding = f"Pad q and k with zeros, as torch.nn.functional.pad(q, (0, {of_v - of_q}))"
        way_out = f"{_list([padding, *_true_scale(of_q, options)], 'and')}."
    return ValueError(f"q, k and v have head_dim {of_q}, {of_k} and {of_v}; they must be equal. {way_out}")


def _true_scale(head_dim: int, options: Options) -> list[str]:
    """What to do about the scale of padded q and k: the default would be that of the head dim they are padded to."""
    return [f"pass softmax_scale={head_dim}**-0.5"] if options.softmax_scale is None else []


def _of_sinks(sinks, q) -> ValueError | None:
    if sinks is None:
        return None
    heads = q.shape[-2]
    if sinks.dim() != 1 or sinks.shape[0] != heads:
        return ValueError(
            f"sinks has shape {_shape(sinks)}; it must be ({heads},), a logit for each head of q. One for all heads: "
            "sinks.expand(heads)."
        )
    if not sinks.dtype.is_floating_point:
        return ValueError(
            f"sinks is {_name(sinks.dtype)}; it must be of a floating-point type. Cast it: sinks.float()."
        )
    if sinks.device != q.device:
        return ValueError(f"sinks is on {sinks.device} and q on {q.device}; they must be on one device.")
    return None


def _of_lengths(q, k, options: Options) -> ValueError | None:
    """Of cu_seqlens and seqused: all that can be seen without waiting for a device. On the CPU that is all of it."""
    counts = {}
    for side, tensor in (("q", q), ("k", k)):
        cu_seqlens, seqused = getattr(options, f"cu_seqlens_{side}"), getattr(options, f"seqused_{side}")
        for name, lengths in ((f"cu_seqlens_{side}", cu_seqlens), (f"seqused_{side}", seqused)):
            if lengths is not None and (refusal := _of_int32(name, lengths, q)):
                return refusal
        if cu_seqlens is not None and cu_seqlens.shape[0] == 0:
            return ValueError(f"cu_seqlens_{side} is empty; it must have one element more than there are sequences.")
        count = tensor.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        counts[side] = count
        if seqused is not None and seqused.shape[0] != count:
            return ValueError(
                f"seqused_{side} has {seqused.shape[0]} elements and there are {count} sequences; it must have one for "
                "each."
            )
    if counts["q"] != counts["k"]:
        return ValueError(
            f"q has {counts['q']} sequences and k, v have {counts['k']}; they must be as many: one for each batch, or "
            "one less than cu_seqlens has elements."
        )
    return _of_length_values(q, "q", options) or _of_length_values(k, "k", options)


def _of_int32(name: str, lengths, q) -> ValueError | None:
    if lengths.dim() != 1 or lengths.dtype != torch.int32 or not lengths.is_contiguous():
        return ValueError(
            f"{name} is {_name(lengths.dtype)} of shape {_shape(lengths)} and strides {lengths.stride()}; it must be "
            f"int32, of one dimension, and contiguous. Convert it: {name}.to(torch.int32).contiguous()."
        )
    if lengths.device != q.device:
        return ValueError(f"{name} is on {lengths.device} and q on {q.device}; they must be on one device.")
    return None


def _of_length_values(x, side: str, options: Options) -> ValueError | None:
    cu_seqlens, seqused = getattr(options, f"cu_seqlens_{side}"), getattr(options, f"seqused_{side}")
    given = [lengths for lengths in (cu_seqlens, seqused) if lengths is not None]
    if not given or any(type(lengths) is not torch.Tensor or not lengths.is_cpu for lengths in given):
        return None
    name = f"cu_seqlens_{side}"
    if cu_seqlens is not None:
        total = x.shape[0]
        if cu_seqlens[0] != 0:
            return ValueError(f"{name} begins with {cu_seqlens[0]}; it must begin with 0.")
        if (cu_seqlens.diff() < 0).any():
            at = int((cu_seqlens.diff() < 0).nonzero()[0])
            return ValueError(f"{name} falls from {cu_seqlens[at]} to {cu_seqlens[at + 1]}; it must never fall.")
        if cu_seqlens[-1] > total:
            return ValueError(
                f"{name} ends with {cu_seqlens[-1]}; it must end with at most total_{side}, here {total}."
            )
    if seqused is not None:
        for i, (begin, used, end) in enumerate(spans(x, cu_seqlens, seqused)):
            if not begin <= used <= end:
                return ValueError(
                    f"seqused_{side}[{i}] is {used - begin}; it must be at least 0, and at most the sequence's length, "
                    f"here {end - begin}."
                )
    return None


def _of_devices(q, k, v, options: Options, device_type: str, on_device: bool, autocast: bool) -> Exception | None:
    if not q.device == k.device == v.device:
        return ValueError(f"q, k and v are on {q.device}, {k.device} and {v.device}; they must be on one device.")
    dtypes = [_dtype_after_autocast(tensor.dtype, device_type) if autocast else tensor.dtype for tensor in (q, k, v)]
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        return ValueError(
            "q, k and v have dtypes {}, {} and {}; they must be equal. Cast them, or call under torch.autocast.".format(
                *map(_name, dtypes)
            )
        )
    on_gpu = device_type == "cuda"
    accepted = limits.GPU_DTYPES if on_gpu else limits.CPU_DTYPES
    if dtypes[0] not in accepted:
        return ValueError(
            f"q, k and v are {_name(dtypes[0])}; on {device_type} they must be {_list(map(_name, accepted))}. "
            "Cast them (q.to(torch.bfloat16)), or call under torch.autocast."
        )
    if not on_gpu:
        return None
    if on_device and (reason := limits.why_unavailable(q.device)):
        return RuntimeError(reason)
    return _no_forward(q.shape[-1], options) or _of_sizes(q, k)


def _no_forward(head_dim: int, options: Options) -> ValueError | None:
    if not limits.TABLE or limits.has_pass("forward", head_dim):
        return None
    head_dim = int(head_dim)  # a symbol where shapes are dynamic
    padding = ""
    if larger := next((dim for dim in limits.supported()["forward"] if dim > head_dim), None):
        zeros = f"pad q, k and v with zeros to {larger}, as torch.nn.functional.pad(q, (0, {larger - head_dim}))"
        steps = [zeros, *_true_scale(head_dim, options), f"keep out[..., :{head_dim}]"]
        padding = f"{_list(steps, 'and')}; "
    return ValueError(
        f"head_dim is {head_dim}; on the GPU {limits.what_runs()}. Ways out: {padding}choose the model's number of "
        "heads so that hidden_size / num_heads is one of these; or use "
        "torch.nn.functional.scaled_dot_product_attention."
    )


def _of_sizes(q, k) -> ValueError | None:
    for name, tensor in (("q", q), ("k", k)):
        # A size that is unknown while tracing is not compared: that would bound it for good.
        if any(isinstance(size, int) and size > LARGEST_SIZE for size in tensor.shape):
            return ValueError(
                f"{name} has shape {_shape(tensor)}; the GPU kernels take sizes up to {LARGEST_SIZE}. "
                "Split the batch or the heads over several calls."
            )
    return None


def _no_backward(head_dim: int, ways_out: str, why: str = "") -> ValueError | None:
    if not limits.TABLE or limits.has_pass("backward", head_dim):
        return None
    trains = limits.supported()["backward"]
    if any(dim > head_dim for dim in trains):
        ways_out += "pad the head_dim with zeros to one that trains, "
    if trains:
        ways_out += "change the model's number of heads, "
    return ValueError(
        f"{why}head_dim {head_dim} has no backward kernel; head dimensions that train: "
        f"{limits.in_words(trains) if trains else 'none in this version'}. {ways_out}"
        "or train with torch.nn.functional.scaled_dot_product_attention."
    )


def _no_option(asked: dict, which: str, head_dim: int, ways_out: str = "", why: str = "") -> ValueError | None:
    """Of the options that a call asks for, the first that the kernels of the pass do not have at this head dim."""
    for name, value in asked.items():
        if not limits.TABLE or limits.has_option(name, which, head_dim):
            continue
        is_tensor = isinstance(value, torch.Tensor)
        what = "lse has a gradient" if name == "dlse" else f"{name} is {'given' if is_tensor else value}"
        dims = limits.head_dims(row for row in limits.TABLE if limits.has_option(name, which, row["head_dim"]))
        have = f"have it at {limits.in_words(dims)}, not at head_dim {head_dim}" if dims else "do not have that yet"
        return ValueError(
            f"{why}{what}; the {which} kernels on the GPU {have}. Ways out: {ways_out}{OF_OPTIONS[name]}, or call with "
            "CPU tensors, which may have every option."
        )
    return None


def _of_results(dout, q, out, lse, dlse) -> ValueError | None:
    """What the backward is given besides the inputs of the forward."""
    packed = q.dim() == 3
    for name, tensor in (("dout", dout), ("out", out)):
        if tensor.shape != q.shape:
            return ValueError(
                f"{name} has shape {_shape(tensor)} and q {_shape(q)}; they must be equal: "
                f"{'(total_q, heads, head_dim)' if packed else '(batch, seqlen_q, heads, head_dim)'}."
            )
        if tensor.dtype != q.dtype:
            return ValueError(
                f"{name} is {_name(tensor.dtype)} and q {_name(q.dtype)}; they must be equal. "
                f"Cast it: {name}.to(q.dtype)."
            )
    if _shape(lse) != lse_shape(q):
        return ValueError(
            f"lse has shape {_shape(lse)}; it must be {'(heads, total_q)' if packed else '(batch, heads, seqlen_q)'}, "
            f"here {lse_shape(q)}, as forward returns it."
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
    if dlse is not None and (dlse.shape, dlse.dtype, dlse.device) != (lse.shape, lse.dtype, lse.device):
        return ValueError(
            f"dlse has shape {_shape(dlse)}, {_name(dlse.dtype)} on {dlse.device}; it must be like lse, "
            f"{_shape(lse)}, {_name(lse.dtype)} on {lse.device}."
        )
    return None


def _dtype_after_autocast(dtype: torch.dtype, device_type: str) -> torch.dtype:
    if dtype in limits.AUTOCAST_DTYPES and torch.amp.is_autocast_available(device_type):
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
    return dtype


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(values, last: str = "or") -> str:
    *head, tail = map(str, values)
    return f"{', '.join(head)} {last} {tail}" if head else tail
