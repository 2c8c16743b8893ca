"""Attention for Hugging Face transformers, as attn_implementation="fa_ext". Opt-in: `register` is the only thing here
that a program calls, and the first to import transformers.

transformers makes a mask once for all layers of a kind, with `mask`, and hands it to `attention` in every layer. It
passes it on as it is, so that the mask's form can say what is to be computed, without values that a GPU would have to
be waited for:

    None                        nothing is masked but by causality
    (batch, keys)               padding: the keys that are used, whose last ones are the queries' own. bool: causal;
                                WINDOW: causal with a sliding window; BIDIRECTIONAL: neither
    (sequences + 1,)            cu_seqlens of packed sequences, int32; int64: with a sliding window
    (batch, 1, queries, keys)   any other mask, which is SDPA's

The name has no "flash" in it: transformers takes every name that has for one of its own FlashAttention packages.
"""

import functools
import warnings

import torch
from torch.compiler import is_compiling
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad

import flash_attn_ext

NAME = "fa_ext"
WINDOW, BIDIRECTIONAL = torch.int8, torch.uint8
REFUSED = "indices", "block_indices", "block_table", "sinks"  # which keys are seen, pages, other sinks than s_aux


def register() -> str:
    """Makes attn_implementation="fa_ext" known to transformers, and returns this name. Again is the same as once.

    Raises:
        ImportError: transformers is not here, or too old.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    return NAME


def unregister() -> None:
    """Undoes `register`. Models that use the name need another before their next call: model.set_attn_implementation.

    Raises:
        ImportError: transformers is not here, or too old.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        functions._global_mapping.pop(NAME, None)


# The mask -------------------------------------------------------------------------------------------------------------


def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, *, mask_function, attention_mask=None, **others):
    """The mask in one of the forms above. Arguments as of transformers' own mask functions; positions of the queries
    begin with q_offset, those of the keys with kv_offset."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    sizes = batch_size, q_length, kv_length, q_offset, kv_offset
    if not is_compiling():
        return _mask(*sizes, mask_function, attention_mask, **others)
    # Dynamo cannot look into a mask function. The two that have nothing to look into are known by themselves.
    simple = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if simple and (q_length == 1 or not isinstance(q_offset, torch.Tensor)):
        return _mask(*sizes, mask_function, attention_mask, **others)
    return _mask_outside_of_graphs(*sizes, mask_function, attention_mask, **others)


def _mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device="cpu", **others):
    def dense():
        from transformers.masking_utils import sdpa_mask

        others["allow_is_causal_skip"] = others["allow_is_bidirectional_skip"] = False
        sizes = batch_size, q_length, kv_length, q_offset, kv_offset
        return sdpa_mask(*sizes, mask_function, attention_mask, device=device, **others)

    pattern = _pattern(mask_function)
    if pattern is None or _is_to_be_changed(pattern, q_length, **others):
        return dense()
    if (sequences := pattern.get("sequences")) is not None:
        if "chunk" in pattern:
            return dense()
        return _starts(sequences).to(torch.int64 if pattern.get("window", kv_length) < kv_length else torch.int32)
    if "bidirectional" in pattern:
        if attention_mask is None or (not is_compiling() and attention_mask.all()):
            return None
        return dense() if attention_mask.shape[1] != kv_length else _of_spans(attention_mask, BIDIRECTIONAL, dense)

    # A static cache has more keys than there are positions yet. Its offset is a tensor, and a single query can do
    # without its value.
    end = q_offset + q_length - kv_offset
    if isinstance(end, torch.Tensor) and (q_length > 1 or kv_offset > 0):
        end = int(end)
    is_known = not isinstance(end, torch.Tensor)
    columns = end if is_known and q_length > 1 else kv_length
    if pattern.get("chunk", kv_length + kv_offset) < kv_length + kv_offset:
        return dense()
    has_window = pattern.get("window", columns) < columns
    used = attention_mask
    if used is not None:
        seen = used.shape[1]
        if is_known and seen == end + kv_offset:
            used = used[:, seen - end :]
        elif kv_offset > 0 and seen != columns:  # of other positions
            return dense()
        short = columns - used.shape[1]
        used = pad(used, (0, short)) if short > 0 else used[:, :columns]
    if not is_known or (q_length == 1 and end < kv_length):
        filled = (torch.arange(kv_length, device=device) < end).expand(batch_size, -1)
        used = filled if used is None else used & filled
    elif used is None or (not is_compiling() and used.all()):
        if q_length == columns == kv_length:
            rows = torch.arange(batch_size + 1, device=device) * q_length
            return rows if has_window else None
        if q_length == 1 and not has_window:
            return None
        used = torch.ones(batch_size, columns, dtype=torch.bool, device=device)
    return _of_spans(used, WINDOW if has_window else torch.bool, dense)


def _is_to_be_changed(pattern, q_length, allow_is_causal_skip=True, allow_is_bidirectional_skip=True, **_) -> bool:
    """Whether the model works on the mask, and so needs it with four dimensions."""
    if "bidirectional" in pattern:
        return not allow_is_bidirectional_skip
    # Of packed sequences, and of a single query with a static cache, the flag says so too, and means nothing.
    return not allow_is_causal_skip and q_length > 1 and "sequences" not in pattern


_mask_outside_of_graphs = torch.compiler.disable(_mask, reason="a mask function has to be looked into")


def _pattern(mask_function) -> dict | None:
    """What a mask function of transformers is made of: "causal" or "bidirectional", with it perhaps "window", "chunk"
    and "sequences", the index of each token's. None: of something else."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is causal_mask_function:
        return {"causal": True}
    if mask_function is bidirectional_mask_function:
        return {"bidirectional": True}
    if getattr(mask_function, "__module__", None) != causal_mask_function.__module__:
        return None
    cells = {
        name: cell.cell_contents
        for name, cell in zip(mask_function.__code__.co_freevars, mask_function.__closure__ or (), strict=True)
    }
    match mask_function.__qualname__.split(".")[0]:
        case "sliding_window_overlay":
            return {"window": cells["sliding_window"]}
        case "chunked_overlay":
            return {"chunk": cells["chunk_size"]}
        case "packed_sequence_mask_function":
            return {"sequences": cells["packed_sequence_mask"]}
        case "remap_positions_for_packed_sequence":
            return _pattern(cells["mask_function"])
        case "and_masks":
            parts = [_pattern(part) for part in cells["mask_functions"]]
            whole = {name: value for part in parts for name, value in (part or {}).items()}
            # Two parts of one kind, or a window without causality, are nothing that is known here.
            is_plain = None not in parts and len(whole) == sum(map(len, parts))
            return whole if is_plain and ("causal" in whole or len(whole) == 1) else None
    return None


def _starts(sequences):
    """cu_seqlens of tokens with the index of their sequence, (batch, seqlen); a sequence ends with its row."""
    is_first = sequences.diff(prepend=sequences[:, :1] - 1) != 0
    return pad(is_first.flatten().nonzero()[:, 0], (0, 1), value=sequences.numel())


def _of_spans(used, dtype, dense):
    """The mask of padding, if what is used of each row is without gaps."""
    has_gaps = (used[:, 1:] & ~used[:, :-1]).sum(1) + used[:, 0] > 1
    if is_compiling():
        torch._assert_async(~has_gaps.any(), "a padding mask with gaps needs attention without torch.compile")
    elif has_gaps.any():
        return dense()
    return used.to(dtype)


# Attention ------------------------------------------------------------------------------------------------------------


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    is_causal=None,
    position_bias=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    **others,
):
    """Attention of one layer. Arguments as of transformers' own attention functions.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv_heads, keys, head_dim).
        attention_mask: in one of the forms above. It decides where there is a window, and sliding_window how wide it
            is, or the module's config. Without one, sliding_window decides: a model may make no masks.
        s_aux: (heads,): sinks.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), of packed sequences; no padding then.

    Returns:
        out: (batch, queries, heads, head_dim); rows of padding are 0 where it does not fall back.
        None, for the probabilities.

    Raises:
        ValueError: the mask is of no form above, there is padding and cu_seq_lens, a window of unknown width, or
            an argument that would change the result and is not known here.
    """
    for name in REFUSED:
        if others.get(name) is not None:
            raise ValueError(f'{NAME} has no {name}: take attn_implementation="sdpa", or "eager".')
    form = None if attention_mask is None else attention_mask.dim()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None
    if form == 2:
        if attention_mask.dtype not in (torch.bool, WINDOW, BIDIRECTIONAL):
            raise ValueError(
                f"attention_mask is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}; a mask of two "
                f"dimensions must come from the mask function of {NAME}. The model does not use it: take "
                'attn_implementation="sdpa".'
            )
        if cu_seq_lens_q is not None:
            raise ValueError("There is padding in attention_mask, and cu_seq_lens_q too: give one of them.")
        causal = attention_mask.dtype != BIDIRECTIONAL
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    if (form == 2 and attention_mask.dtype == WINDOW) or (form == 1 and attention_mask.dtype == torch.int64):
        window = sliding_window or getattr(module.config, "sliding_window", None)
        if window is None:
            raise ValueError("The mask has a sliding window, and neither the call nor module.config its width.")
    if form is None and causal and sliding_window and sliding_window < key.shape[2]:
        window = sliding_window
    if form == 1:
        causal = True
        if cu_seq_lens_q is None:
            cu_seq_lens_q = cu_seq_lens_k = attention_mask
    if cu_seq_lens_q is not None:
        cu_seq_lens_q, cu_seq_lens_k = (x.to(torch.int32) for x in (cu_seq_lens_q, cu_seq_lens_k))

    options = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "s_aux": s_aux}
    if reason := _why_not(query, key, value, attention_mask, dropout, position_bias, causal, cu_seq_lens_q):
        _warn_once(reason)
        if attention_mask is not None or cu_seq_lens_q is not None or window is not None:
            attention_mask = _dense_mask(query, key, attention_mask, causal, window, cu_seq_lens_q, cu_seq_lens_k)
        if softcap or s_aux is not None:
            return _plain(query, key, value, attention_mask, causal, position_bias, **options), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        del options["softcap"], options["s_aux"]
        others |= {"is_causal": causal, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **others)

    options = {
        "softmax_scale": scaling,
        "causal": bool(causal),
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if form == 2:
        lengths = _lengths(attention_mask != 0, q.shape[1], causal)
    elif cu_seq_lens_q is not None:
        lengths = {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k}
    else:
        return flash_attn_ext.flash_attn_func(q, k, v, **options), None
    rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_ext.flash_attn_varlen_func(rows, keys, values, **lengths, **options).view_as(q), None


def _lengths(used, queries: int, causal: bool) -> dict:
    """Of padded rows, as packed sequences with parts that nobody uses. used: (batch, keys).

    A first sequence, of which nothing is used, has what comes before the first row's. Of causal attention the queries
    are the last keys, and may be padding as they; a single one is not, and others are queries all the same.
    """
    of_queries = used[:, -queries:] if causal and queries > 1 else used.new_ones(len(used), queries)
    lengths = {}
    for side, of_side in (("q", of_queries), ("k", used)):
        batch, seqlen = of_side.shape
        begins = torch.arange(batch, device=used.device) * seqlen + of_side.int().argmax(1)
        edges = pad(pad(begins, (1, 0)), (0, 1), value=batch * seqlen)
        lengths[f"cu_seqlens_{side}"] = edges.int()
        lengths[f"seqused_{side}"] = pad(of_side.sum(1), (1, 0)).int()
    return lengths


# Where it falls back --------------------------------------------------------------------------------------------------


def _why_not(query, key, value, attention_mask, dropout, position_bias, causal, cu_seq_lens_q) -> str | None:
    if attention_mask is not None and attention_mask.dim() == 4:
        return "the mask is neither causal, a sliding window, padding nor packed sequences"
    if position_bias is not None:
        return "there is a bias on the scores"
    if dropout > 0:
        return "there is attention dropout"
    if value.shape[-1] != query.shape[-1]:
        return f"v has head dim {value.shape[-1]} and q {query.shape[-1]}"
    if attention_mask is None and cu_seq_lens_q is None and causal and 1 < query.shape[2] != key.shape[2]:
        return "the model's mask does not come from transformers' mask functions"
    # Under torch.compile the call itself says it, with an error.
    if query.is_cuda and not is_compiling():
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        requires_grad = torch.is_grad_enabled() and query.requires_grad
        return _refusal(query.device, query.dtype, query.shape[-1], autocast, requires_grad)
    return None


@functools.cache
def _refusal(device, dtype, head_dim, autocast, requires_grad) -> str | None:
    """Why no call with such tensors runs, or None. Under autocast the answer is of that autocast, which is on."""
    x = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype, requires_grad=requires_grad)
    return flash_attn_ext.explain(x, x, x)


@functools.cache
def _warned(reason: str) -> None:
    warnings.warn(f"{NAME}: {reason}; this attention is computed by SDPA or in plain PyTorch instead.", stacklevel=4)


def _warn_once(reason: str) -> None:
    if not is_compiling():
        _warned(reason)


def _dense_mask(query, key, attention_mask, causal, window, cu_seq_lens_q, cu_seq_lens_k):
    """The mask, (batch or 1, 1, queries, keys): bool, or additive as attention_mask is; that in any of its forms."""
    queries, keys, device = query.shape[2], key.shape[2], query.device
    dense = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if attention_mask is None or attention_mask.dim() != 4:
        of_keys = torch.arange(keys, device=device)
        of_queries = torch.arange(keys - queries, keys, device=device)[:, None]
        if attention_mask is not None and attention_mask.dim() == 2:
            used = (attention_mask != 0)[:, None, None]
            dense = dense & used
            if queries == 1:
                of_queries = (used * of_keys).amax(-1, keepdim=True)
        if causal:
            dense = dense & (of_keys <= of_queries)
        if window is not None:
            dense = dense & (of_keys > of_queries - window)
    if cu_seq_lens_q is not None:
        of_rows, of_columns = (
            torch.searchsorted(
                edges, torch.arange(x.shape[0] * x.shape[2], device=device, dtype=torch.int32), right=True
            ).view(x.shape[0], 1, x.shape[2])
            for edges, x in ((cu_seq_lens_q, query), (cu_seq_lens_k, key))
        )
        dense = dense & (of_rows[..., None] == of_columns[..., None, :])
    if attention_mask is None or attention_mask.dim() != 4:
        return dense
    if attention_mask.dtype == torch.bool:
        return attention_mask & dense
    return attention_mask.masked_fill(~dense, torch.finfo(attention_mask.dtype).min)


def _plain(query, key, value, attention_mask, causal, position_bias, dropout, scaling, softcap, s_aux):
    """With softcap and sinks, which SDPA does not have. Every score is in memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None and causal and scores.shape[-2] > 1:  # aligned to the top left, as SDPA's
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    keys = scores.shape[-1]
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    probabilities = scores.softmax(-1, dtype=torch.float32)[..., :keys].to(value.dtype)
    return (drop(probabilities, dropout) @ value).transpose(1, 2).contiguous()
