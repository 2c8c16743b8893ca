"""The functions that users call."""

from contextlib import AbstractContextManager

import torch
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from . import keywords, ops, reference, refusals
from ._binary import _C
from .options import Options


# q, k and v are required. They have a default so that a call with SDPA's names is told which ones to use.
def flash_attn_func(
    q: torch.Tensor = None,
    k: torch.Tensor = None,
    v: torch.Tensor = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *others,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    **others_by_name,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention, softmax(softmax_scale * q k^T) v, without the matrix of scores in memory. Differentiable, once.

    On Hopper GPUs by the algorithm of FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2; the softmax by blocks
    is from FlashAttention, Dao et al. 2022, section 3.1; the gradients: see `backward`); on the CPU in PyTorch, with
    the results of `attention_reference` up to rounding.

    Args:
        q: (batch, seqlen_q, heads, head_dim). float16 or bfloat16 on CUDA; also float32 and float64 on the CPU. Under
            autocast float32, float16 and bfloat16 inputs are cast to autocast's dtype. On CUDA head_dim is a multiple
            of 8, as `supported` has them.
        k, v: (batch, seqlen_k, kv_heads, head_dim), dtype and device of q. heads is a multiple of kv_heads: each group
            of heads // kv_heads neighbouring query heads shares a key and value head (GQA; MQA if kv_heads is 1).
        softmax_scale: factor of the scores before the softmax, finite and > 0. Default: 1/sqrt(head_dim).
        causal: query i sees key j iff j <= i + seqlen_k - seqlen_q: the mask is aligned to the bottom right, so that
            the last query sees every key.
        window_size: (left, right): query i sees key j only if i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k -
            seqlen_q + right. -1 is unbounded; causal=True sets right to 0.
        softcap: scores become softcap * tanh(score / softcap) before the mask, where it is not 0.
        sinks: (heads,), of any floating-point type: a logit for each head that joins the sum of the softmax, and no
            value: it takes weight from the keys that a query sees.
        deterministic: the gradients are the same in every run of a call, bit for bit. Without it the last bits of q's
            vary on a GPU, where the backward is faster then. torch.use_deterministic_algorithms(True) asks for it too.
            out and lse are the same in every run anyway.
        return_lse: also return lse.
        others, others_by_name: arguments that only FlashAttention-2, FlashAttention-3 or SDPA have. What asks for
            nothing passes, as dropout_p=0.0 and num_splits=1; the rest is refused by name. return_attn_probs=True is
            return_lse=True, as in FlashAttention-3. README has the table.

    Returns:
        out: shape, dtype and strides of torch.empty_like(q). Rows that see no key are 0.
        lse, if return_lse: (batch, heads, seqlen_q), float32: natural logarithm of the sum of exp(score) of each row,
            with exp(sink) in it. Rows that see no key have -inf, or the sink. It is differentiable like out.

    On CUDA the inputs are read where they lie if their last stride is 1 and their address and other strides are
    multiples of 16 bytes and not 0: (batch, heads, seqlen, head_dim) memory and slices of a packed qkv are. Other
    layouts are copied first. Work goes to the current stream of q's device; the call does not wait for it.

    Gradients have the strides of torch.empty_like(input), and only those that are needed are written. q, k, v, out
    and lse are kept for them. An input that requires grad needs a head_dim that trains (`supported`), or grad mode
    off: that is refused here, and not later. Gradients cannot be differentiated again.

    Raises:
        TypeError: an argument is not a tensor, a number or a bool where it must be, is sparse or nested, or has no
            place here by its position or name.
        ValueError: shapes, dtypes, devices or an option's value do not fit, the head_dim has no kernel or its kernel
            does not have an option, an input requires grad and the backward kernel is not there or does not have it, or
            another function's argument asks for something. `explain` gives the text without making the call. In the
            backward on a GPU, if a loss uses lse and the kernel has no gradient of it.
        NotImplementedError: torch.func differentiates the call (grad, vjp, jvp).
        RuntimeError: CUDA tensors on a GPU that is not a Hopper, or in an installation without the GPU kernels.
    """
    if others or others_by_name:
        if refusal := keywords.refusal(others, others_by_name):
            raise refusal
        return_lse = return_lse or others_by_name.get("return_attn_probs", False)
    out, lse = _attend(q, k, v, Options.of(softmax_scale, causal, window_size, softcap, sinks, deterministic))
    return (out, lse) if return_lse else out


def flash_attn_varlen_func(
    q: torch.Tensor = None,
    k: torch.Tensor = None,
    v: torch.Tensor = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *others,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    **others_by_name,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` on sequences of several lengths, packed one after the other. A query sees keys of its own
    sequence only.

    Args:
        q: (total_q, heads, head_dim). dtypes as in `flash_attn_func`.
        k, v: (total_k, kv_heads, head_dim).
        cu_seqlens_q: (sequences + 1,), int32, contiguous, on q's device: sequence i is the rows cu_seqlens_q[i] to
            cu_seqlens_q[i + 1] of q. It begins with 0 and never falls; sequences may be empty. Rows after the last
            sequence belong to none. None: q is dense, (batch, seqlen_q, heads, head_dim), a sequence for each batch.
        cu_seqlens_k: the same of k and v.
        max_seqlen_q, max_seqlen_k: accepted for FlashAttention's sake, and not needed.
        seqused_q, seqused_k: (sequences,), int32, contiguous, on q's device: how many rows, or keys, of each sequence
            are used, from its first one on. Default: all.
        softmax_scale, causal, window_size, softcap, sinks: as in `flash_attn_func`, for each sequence by itself: masks
            are aligned to the bottom right of what is used of it.
        deterministic: as in `flash_attn_func`.
        return_lse: also return lse.
        others, others_by_name: as in `flash_attn_func`.

    Returns:
        out: shape, dtype and strides of torch.empty_like(q). Rows that see no key, are not used or belong to no
            sequence are 0.
        lse, if return_lse: (heads, total_q), float32, or (batch, heads, seqlen_q) if q is dense; as in
            `flash_attn_func`. -inf for rows that are not used or belong to no sequence.

    Nothing waits for the device to read the lengths. On the CPU values that are out of range are refused; on a GPU they
    are not seen, and what they leave out or reach twice is unspecified.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `flash_attn_func`, and ValueError if cu_seqlens or
            seqused do not fit q, k and v.
    """
    if others or others_by_name:
        if refusal := keywords.refusal(others, others_by_name, "flash_attn_varlen_func"):
            raise refusal
        return_lse = return_lse or others_by_name.get("return_attn_probs", False)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    out, lse = _attend(q, k, v, Options.of(softmax_scale, causal, window_size, softcap, sinks, deterministic, *lengths))
    return (out, lse) if return_lse else out


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    num_heads_q: int | None = None,
    **options,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` of q, k and v that are slices of one tensor, as one projection makes them. They are read where
    they lie.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim); with num_heads_q (batch, seqlen, heads + 2 kv_heads, head_dim).
        num_heads_q: how many of the heads are q's.
        softmax_scale, causal, options: as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`.

    Raises:
        ValueError: qkv has another shape.
        Others: as `flash_attn_func`.
    """
    q, k, v = _unpacked(qkv, 5, num_heads_q)
    return flash_attn_func(q, k, v, softmax_scale, causal, **options)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | None = None,
    *,
    num_heads_q: int | None = None,
    **options,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_varlen_func` of q, k and v that are slices of one tensor.

    Args:
        qkv: (total, 3, heads, head_dim); with num_heads_q (total, heads + 2 kv_heads, head_dim).
        cu_seqlens: (sequences + 1,), as in `flash_attn_varlen_func`, of q, k and v alike.
        max_seqlen: accepted, and not needed.
        num_heads_q: how many of the heads are q's.
        options: as in `flash_attn_varlen_func`.

    Returns:
        As `flash_attn_varlen_func`.

    Raises:
        ValueError: qkv has another shape.
        Others: as `flash_attn_varlen_func`.
    """
    q, k, v = _unpacked(qkv, 4, num_heads_q)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, **options)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` or, with lengths, `flash_attn_varlen_func`, with return_lse=True: returns (out, lse)."""
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    return _attend(q, k, v, Options.of(softmax_scale, causal, window_size, softcap, sinks, deterministic, *lengths))


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of `forward`, for code that calls the kernels by itself; autograd calls the same kernel.

    After FlashAttention-2 (Dao 2023, section 3.1.2; on Hopper FlashAttention-3, Shah et al. 2024, appendix B): the
    probabilities are computed again from q, k and lse. On the CPU in PyTorch, with the results of
    `attention_reference_backward` up to rounding.

    out and lse are used as they are given. Where k and v are one part of the keys (ring attention), pass the out and
    lse that were merged over all parts: dk and dv are then this part's, and the sum of every part's dq is q's gradient.

    Args:
        dout: gradient of the loss with respect to out; shape, dtype and device of q. Any strides.
        q, k, v, softmax_scale, causal, window_size, softcap, lengths: as in `forward`. Autocast casts nothing here.
        deterministic: as in `flash_attn_func`.
        out: shape, dtype and device of q.
        lse: (batch, heads, seqlen_q), packed (heads, total_q), float32, on q's device; natural logarithm, -inf for rows
            that see no key.
        sinks: as in `forward`, where their gradient is wanted; lse has them in it already.
        dlse: gradient of the loss with respect to lse, like lse; None: the loss does not use it.

    Returns:
        dq, dk, dv: shapes, dtypes and strides of torch.empty_like(q), (k) and (v). Rows that see no key contribute 0.
        dsinks, if sinks are given: shape and dtype of sinks.

    Raises:
        TypeError, ValueError, RuntimeError: as `flash_attn_func`, and ValueError if dout, out, lse or dlse do not fit q
            or the head_dim has no backward kernel.
    """
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    options = Options.of(softmax_scale, causal, window_size, softcap, sinks, deterministic, *lengths)
    if not is_compiling():
        optional = {} if dlse is None else {"dlse": dlse}
        refusals.check_arguments(options, dout=dout, q=q, k=k, v=v, out=out, lse=lse, **optional)
    gradients = ops.backward(dout, q, k, v, out, lse, *options.plain(), dlse)
    return gradients if sinks is not None else gradients[:3]


def explain(
    q: torch.Tensor = None,
    k: torch.Tensor = None,
    v: torch.Tensor = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *others,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    return_lse: bool = False,
    target: str | None = None,
    **others_by_name,
) -> str | None:
    """Why `flash_attn_func` would refuse this call, or None if it would run. Makes no call.

    Takes the arguments of `flash_attn_func`, and by name those of `flash_attn_varlen_func`. The text names the
    argument, its value, what is accepted, and the way out. Where grad mode is on, gradients that the inputs require
    count too.

    Args:
        target: "hopper" asks what a Hopper GPU would say to these shapes and dtypes. q, k and v may be on any device
            then, "meta" too, and no GPU is needed. Default: what the call would do here.

    Raises:
        ValueError: target is neither None nor "hopper".
    """
    if target not in (None, "hopper"):
        raise ValueError(f'target is {target!r}; it must be "hopper", or None for the device of q, k and v.')
    on_hopper = target == "hopper"
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    options = Options.of(softmax_scale, causal, window_size, softcap, sinks, deterministic, *lengths)
    refusal = keywords.refusal(others, others_by_name)
    refusal = refusal or refusals.of_forward(q, k, v, options, on_hopper=on_hopper)
    if refusal is None and torch.is_grad_enabled():
        refusal = refusals.of_gradients(q, k, v, options, on_hopper=on_hopper)
    return str(refusal) if refusal else None


def sdpa() -> AbstractContextManager[None]:
    """A context in which torch.nn.functional.scaled_dot_product_attention and torch.nn.attention.varlen.varlen_attn run
    on these kernels, forward and backward, where they take the call.

    They take float16 and bfloat16 on a Hopper GPU at the head dims that train (`supported`), with or without is_causal,
    grouped heads and a scale. Every other call goes where it goes outside of the context: masks, dropout, windows of
    varlen_attn, other head dims, dtypes and devices; but varlen_attn takes CPU tensors, for which torch has nothing.
    The backward counts by itself, by where it runs. The lse of varlen_attn has no gradient, as outside: that of
    flash_attn_varlen_func has. The setting is one of the whole process. On exit, after an exception too, the
    implementation that was active before is again.

    Raises:
        RuntimeError: this installation has no GPU kernels. The context raises it on entry.
        ImportError: torch has no registry of flash attention implementations, as 2.11 and later have.
    """
    from .adapters import sdpa  # torch's registry hears of this package only where a program asks for it

    return sdpa.activated()


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(softmax_scale * q k^T) v, with every score in memory (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, kv_heads, head_dim). Query head h uses key and value head h // (heads // kv_heads).
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k: lengths, as in `flash_attn_varlen_func`.
        softmax_scale: factor of the scores, default 1/sqrt(head_dim).
        causal, window_size: query i sees key j iff i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q +
            right (bottom-right aligned). -1 is unbounded; causal=True sets right to 0.
        softcap: scores become softcap * tanh(score / softcap) before the mask, where it is not 0.
        sinks: (heads,): a logit for each head that joins the sum of the softmax, and no value.
        deterministic: accepted, and changes nothing.
        compute_dtype: default float64 for float64 inputs, else float32. The inputs' own low precision gives what plain
            PyTorch attention in that precision would, which is the yardstick for a kernel's error.

    Returns:
        out: like q, in q's dtype. Rows that see no key, or only scores of -inf, are 0.
        lse: (batch, heads, seqlen_q), natural logarithm of the sum of exp(score), with exp(sink) in it; float32, or
            float64 for float64 inputs or computations. -inf, or the sink, for the rows whose out is 0.

    Both are differentiable; the rows that are 0 contribute no gradient and no NaN.
    """
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    options = Options.of(softmax_scale, causal, window_size, softcap, sinks, deterministic, *lengths)
    return reference.forward(q, k, v, options, compute_dtype)


def attention_reference_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    deterministic: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of `attention_reference` from out and lse as they are given (FlashAttention-2, Dao 2023,
    section 3.1.2), with every score in memory: given those of a longer sequence of keys, of which k and v are a part,
    dk and dv are this part's gradients, and the dq of all parts add up to q's.

    Args:
        dout, out: like q.
        q, k, v, softmax_scale, causal, window_size, softcap, sinks, deterministic, lengths: as in the forward.
        lse: (batch, heads, seqlen_q), natural logarithm. Rows of -inf saw nothing and contribute nothing.
        dlse: gradient of the loss with respect to lse; None: the loss does not use it.

    Returns:
        dq, dk, dv, and dsinks if sinks are given: shapes and dtypes of q, k, v and sinks. Computed in float64 for
        float64 inputs, else in float32.
    """
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    options = Options.of(softmax_scale, causal, window_size, softcap, sinks, deterministic, *lengths)
    return reference.backward(dout, q, k, v, out, lse, options, dlse)


def _attend(q, k, v, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    if is_compiling():
        return ops.forward(q, k, v, *options)
    if has_torch_function_variadic(q, k, v, *options):
        return _forward_by_operator(q, k, v, options)
    return _forward(q, k, v, options)


def _unpacked(qkv, dims: int, num_heads_q: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v; dims: of a qkv that has them in a dimension of its own."""
    refusals.check_arguments(Options(), qkv=qkv)
    if refusal := refusals.of_qkv(qkv, dims, num_heads_q):
        raise refusal
    if num_heads_q is None:
        return qkv.unbind(-3)
    kv_heads = (qkv.shape[-2] - num_heads_q) // 2
    return qkv.split([num_heads_q, kv_heads, kv_heads], -2)


def _forward_by_operator(q, k, v, options: Options):
    """`forward` without the shortcut of the compiled module."""
    refusals.check_arguments(options, q=q, k=k, v=v)
    # These here too: the operator's kernel no longer sees what torch.func does.
    refusals.check_forward_mode(q, k, v, options)
    refusals.check_transforms(q, k, v, options)
    return ops.forward(q, k, v, *options.plain())


if _C:
    # It calls its kernel at once where the dispatcher would do nothing else, and the operator elsewhere.
    _forward = _C.forward
    _C.register(
        options=Options,
        forward=_forward_by_operator,
        check=refusals.check,
        check_backward=refusals.check_backward,
        check_derivatives=refusals.check_derivatives,
    )
else:
    _forward = _forward_by_operator
