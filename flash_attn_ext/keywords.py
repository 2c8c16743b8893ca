"""Arguments of other attention functions: FlashAttention-2's and -3's flash_attn_func and flash_attn_varlen_func, the
latter's _flash_attn_forward, torch's scaled_dot_product_attention (SDPA). What asks for nothing passes; the rest is
refused by its name, with the way out.
"""

from typing import Any, NamedTuple

import torch

from .refusals import FLEX

SDPA = "torch.nn.functional.scaled_dot_product_attention"
POSITIONS = {  # of the functions that look at them
    "flash_attn_func": "q, k, v, softmax_scale, causal",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
}
BY_NAME = {
    "flash_attn_func": "window_size, softcap, sinks, deterministic, return_lse",
    "flash_attn_varlen_func": "seqused_q, seqused_k, softmax_scale, causal, window_size, softcap, sinks, "
    "deterministic, return_lse",
}
LAYOUT = "SDPA's tensors are (batch, heads, seqlen, head_dim), and these must be (batch, seqlen, heads, head_dim)"

# of FlashAttention-3's _flash_attn_forward
CACHE_ARGUMENTS = (
    *("k_new", "v_new", "cu_seqlens_k_new", "page_table", "kv_batch_idx", "leftpad_k"),
    *("rotary_cos", "rotary_sin", "seqlens_rotary", "scheduler_metadata"),
)
NO_CACHE = "No call here appends to a KV cache, rotates keys or reads pages: leave it out, or take FlashAttention-3."


class Keyword(NamedTuple):
    passes: tuple  # the values, or a type: any value of it
    way_out: str

    def takes(self, value) -> bool:
        if value is None:  # most are
            return None in self.passes
        if isinstance(value, list):
            value = tuple(value)
        plain = isinstance(value, bool | int | float | tuple)  # others compare in ways of their own
        return plain and any(isinstance(value, x) if isinstance(x, type) else value == x for x in self.passes)

    def accepted(self) -> str:
        return " or ".join(f"any {x.__name__}" if isinstance(x, type) else repr(x) for x in self.passes)


KEYWORDS = {
    # FlashAttention-2 and -3
    "dropout_p": Keyword((0.0,), f"There is no attention dropout: set it to 0 in the model, or use {SDPA}."),
    "alibi_slopes": Keyword((None,), f"There are no biases: use {FLEX}."),
    "return_attn_probs": Keyword((bool,), "True returns (out, lse), as in FlashAttention-3."),
    "qv": Keyword((None,), "There is no second query for v: use FlashAttention-3."),
    "q_descale": Keyword((None,), "There is no FP8: cast q, k and v to bfloat16, or use FlashAttention-3."),
    "k_descale": Keyword((None,), "There is no FP8: cast q, k and v to bfloat16, or use FlashAttention-3."),
    "v_descale": Keyword((None,), "There is no FP8: cast q, k and v to bfloat16, or use FlashAttention-3."),
    "attention_chunk": Keyword((0, None), f"There is no chunked attention: use {FLEX}, or a call for each chunk."),
    "num_splits": Keyword((0, 1, None), "The keys of a row are not split: leave it out."),
    "pack_gqa": Keyword((bool, None), "It changes nothing here: leave it out."),
    "sm_margin": Keyword((int,), "It changes nothing here: leave it out."),
    "block_table": Keyword((None,), "There is no paged KV cache: use FlashAttention-3."),
    **dict.fromkeys(CACHE_ARGUMENTS, Keyword((None,), NO_CACHE)),
    "rotary_interleaved": Keyword((bool,), "It changes nothing here: leave it out."),
    "out_": Keyword((None,), "The output is a new tensor: copy it."),
    "s_aux": Keyword((None,), "The name is sinks."),  # of the FlashAttention-3 of vLLM and Transformers
    "learnable_sink": Keyword((None,), "The name is sinks."),  # FlashAttention-4
    # SDPA
    "query": Keyword((), f"The name is q. {LAYOUT}: q=query.transpose(1, 2)."),
    "key": Keyword((), f"The name is k. {LAYOUT}: k=key.transpose(1, 2)."),
    "value": Keyword((), f"The name is v. {LAYOUT}: v=value.transpose(1, 2)."),
    "attn_mask": Keyword((None,), f"There are no masks but causal=True and window_size: use {SDPA}, or {FLEX}."),
    "is_causal": Keyword(
        (False,), f"The name is causal: its mask is aligned to the bottom right, SDPA's to the top left. {LAYOUT}."
    ),
    "scale": Keyword((None,), f"The name is softmax_scale. {LAYOUT}."),
    "enable_gqa": Keyword((bool,), "It is always on: leave it out."),
}


def refusal(positional: tuple, by_name: dict[str, Any], function: str = "flash_attn_func") -> Exception | None:
    """What is wrong with the arguments of a call that the function has no parameters for, or None."""
    positions, dropout = POSITIONS[function], "fourth" if function == "flash_attn_func" else "eighth"
    if positional:
        count = len(positions.split())
        return TypeError(
            f"{count + len(positional)} arguments by position; {function} takes {count}: {positions}. FlashAttention-2 "
            f"has dropout_p in the {dropout} place, before softmax_scale: pass all but q, k and v by name."
        )
    for name, value in by_name.items():
        keyword = KEYWORDS.get(name)
        if keyword is None:
            return TypeError(
                f"{function} has no argument {name}. It takes {positions} and, by name, {BY_NAME[function]}; also what "
                "other attention functions have, where it asks for nothing: "
                f"{', '.join(name for name, keyword in KEYWORDS.items() if keyword.passes)}."
            )
        if not keyword.passes:
            return TypeError(f"{function} has no argument {name}. {keyword.way_out}")
        if not keyword.takes(value):
            shown = type(value).__name__ if isinstance(value, torch.Tensor) else f"{value!r:.60}"
            return ValueError(f"{name} is {shown}; only {keyword.accepted()} is accepted. {keyword.way_out}")
    return None
