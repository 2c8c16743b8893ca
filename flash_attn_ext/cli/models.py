"""Reads from a model's config.json what its attention is: shapes, and what it does besides plain attention.

Each family of models has its own names for the same things. The names here are those that Hugging Face's
configurations use; a name that is known to none of them is an error, never a guess.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .layers import Layers, groups_of
from .values import (
    DECODER_HEADS,
    DROPOUT,
    HEAD_DIM,
    HEADS,
    HIDDEN_SIZE,
    KV_HEADS,
    LONGEST,
    SOFTCAP,
    WINDOW,
    Unreadable,
    Values,
)

# Their num_heads are not those of an attention.
NO_SOFTMAX = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")

LANGUAGE = ("text_config", "llm_config", "language_config")
GIVE_SHAPES = (
    "If it is a model's configuration, give its shapes: --hidden-size, --num-heads, --num-kv-heads, --head-dim"
)

# Scales that no key of the file tells; None: learned, so that no number is right.
SCALES = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano"), "1.0"),
    **dict.fromkeys(("gpt_neo", "pix2struct_text_model", "dia_encoder", "dia_decoder"), "1.0"),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_vision", "gemma4_unified_text"), "1.0"),
    **dict.fromkeys(("diffusion_gemma_text", "embedding_gemma2_text"), "1.0"),
    **dict.fromkeys(("zamba", "zamba2"), "({head_dim}/2)**-0.5"),
    "inkling_text": "1/{head_dim}",
    "gemma4_audio": None,
}

# What the whole of a model says about its language model.
OF_THE_LANGUAGE_MODEL = ("prefix_lm", "mm_tokens_per_image")


@dataclass(frozen=True)
class Need:
    """Something that the attention does besides softmax(scale * q k^T) v with an optional causal mask."""

    name: str
    because: str  # what in the configuration says so
    way_out: str
    argument: str | None = None  # of flash_attn_func, which does it as soon as it takes that; None: nothing planned
    only_training: bool = False


@dataclass(frozen=True)
class Attention:
    """The attention of one part of a model: its language model, its vision encoder, ..."""

    part: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None  # of q and k; None: hidden_size is no multiple of the heads
    head_dim_v: int | None
    hidden_size: int | None
    softmax_scale: str | None  # an expression; None: not known
    needs: tuple[Need, ...] = ()
    notes: tuple[str, ...] = ()
    not_looked_at: tuple[str, ...] = ()  # what else there is, of which nothing is known


def read(config: object, seqlen: int | None = None) -> list[Attention]:
    """Every attention that the configuration describes; the language model first.

    seqlen: the longest sequence that will be used, if it is less than the model allows: shorter windows matter then.
    """
    if not isinstance(config, dict):
        raise Unreadable(f"a model's configuration is a JSON object, and this is {type(config).__name__}")
    found: list[Attention] = []
    silent: list[str] = []
    for part, values in _parts(config, "model", silent):
        for attention in _attentions(part, values, seqlen):
            _add(found, attention)
    if any(part.split(".")[-1] in LANGUAGE for part in silent):
        raise Unreadable(f"{silent[0]} does not give its number of heads (known: {', '.join(HEADS)}). {GIVE_SHAPES}")
    if not found:
        raise Unreadable(
            f"no attention found: none of {', '.join(HEADS)} is there, at the top or nested"
            + (f" (its keys: {', '.join(map(str, list(config)[:8]))})" if config else " (it is empty)")
            + f". {GIVE_SHAPES}"
        )
    parts = tuple(f"{part}, which does not give its number of heads" for part in silent)
    first = replace(
        found[0], not_looked_at=found[0].not_looked_at + parts, notes=found[0].notes + _notes_on_code(config)
    )
    return [first, *found[1:]]


def _notes_on_code(config: dict) -> tuple[str, ...]:
    """Of code that comes with the model, which nobody has looked at."""
    classes = config.get("auto_map")
    models = [f"{value}" for name, value in classes.items() if "Model" in name] if isinstance(classes, dict) else []
    if not models:
        return ()
    return (f"the model has code of its own, which was not read ({models[0]}): look there for another scale or mask",)


def _parts(config: dict, part: str, silent: list[str], depth: int = 0) -> Iterator[tuple[str, Values]]:
    """The configuration and those nested in it that have attention; `silent` gets those that seem to and do not say."""
    values = Values(config, part)
    if values["model_type"] in NO_SOFTMAX:
        raise Unreadable(f"{part} is a {values['model_type']}, which has no softmax attention to run")
    if any(name in values.of for name in HEADS + DECODER_HEADS):
        yield part, values
    elif part.endswith("_config") and any(name in values.of for name in ("model_type", *HIDDEN_SIZE)):
        silent.append(part)
    nested = [name for name, value in config.items() if isinstance(value, dict)]
    nested = [name for name in nested if name.endswith("_config") or name in ("encoder", "decoder", "text_encoder")]
    nested = [name for name in nested if name not in ("attn_config", "ffn_config")]  # of the part itself: Values
    for name in sorted(nested, key=lambda name: name not in LANGUAGE):
        inner = config[name]
        if name in LANGUAGE:
            inner = {key: values[key] for key in OF_THE_LANGUAGE_MODEL if values[key]} | inner
        if depth < 4:  # Qwen-Omni has three
            yield from _parts(inner, name if part == "model" else f"{part}.{name}", silent, depth + 1)


def _attentions(part: str, values: Values, seqlen: int | None) -> Iterator[Attention]:
    if values.name(DECODER_HEADS) in values.of and values.name(HEADS) in values.of:  # BART, Whisper
        layers = Layers.of(values)
        for side, names in (("encoder", HEADS), ("decoder", DECODER_HEADS)):
            heads = values.whole(*names)
            label = side if part == "model" else f"{part}.{side}"
            yield _attention(label, values, layers, seqlen, heads, heads)
        return
    groups = groups_of(values)
    for own, layers in groups:
        heads = own.whole(*HEADS, *DECODER_HEADS)
        assert heads is not None
        label = part if len(groups) == 1 else f"{part}, {layers.label()}"
        yield _attention(label, own, layers, seqlen, heads, _kv_heads(own, heads))


def _kv_heads(values: Values, heads: int) -> int:
    if values["multi_query"] is True and values["new_decoder_architecture"] is not True:  # Falcon 7B, StarCoder
        return 1
    if values["multi_query_attention"] is True:  # ChatGLM
        return values.whole("multi_query_group_num") or 1
    if values.whole("kv_lora_rank") and values.whole("qk_nope_head_dim"):  # MLA: every head has its own key and value
        return heads
    return values.whole(*KV_HEADS) or heads


def _attention(part, values: Values, layers: Layers, seqlen, heads: int, kv_heads: int) -> Attention:
    hidden_size = values.whole(*HIDDEN_SIZE)
    nope, rope = (values.whole(f"qk_{kind}_head_dim", least=0) for kind in ("nope", "rope"))
    if nope and rope is not None:  # MLA; a head_dim beside these is that of the rotary part
        head_dim, head_dim_v = nope + rope, values.whole("v_head_dim") or nope
    else:
        head_dim = values.whole(*HEAD_DIM) or _quotient(values, hidden_size, heads)
        head_dim_v = values.whole("v_head_dim") or head_dim
    scale, notes = _softmax_scale(values, head_dim)
    needs = tuple(_needs(values, layers, seqlen, notes))
    notes += _notes_on_masks(values)
    if (dtype := values["dtype"] or values["torch_dtype"]) in ("float32", "float64"):
        notes.append(f"the weights are {dtype}: cast the model to bfloat16 or float16, or run it under torch.autocast")
    shapes = heads, kv_heads, head_dim, head_dim_v, hidden_size
    return Attention(part, *shapes, scale, needs, tuple(notes), tuple(layers.not_looked_at(values)))


def _quotient(values: Values, hidden_size: int | None, heads: int) -> int | None:
    if hidden_size is None:
        raise Unreadable(
            f"{values.part}: it has {heads} heads, and none of {', '.join(HEAD_DIM + HIDDEN_SIZE)} to tell their size"
        )
    return hidden_size // heads if hidden_size % heads == 0 else None


def _softmax_scale(values: Values, head_dim: int | None) -> tuple[str | None, list[str]]:
    """The scale as an expression, and a note where it is not the default."""
    default = f"{head_dim}**-0.5"
    family = str(values["model_type"])
    where = ""
    if family in SCALES:
        scale, name = SCALES[family], "model_type"
        if scale is None:
            return None, [f"the scale is not known: {family} learns it"]
        scale = scale.format(head_dim=head_dim)
    elif number := values.number("softmax_scale"):  # MPT
        scale, name = f"{number:g}", "softmax_scale"
    elif scalar := values.number("query_pre_attn_scalar"):  # Gemma 2 and 3
        scale, name = f"{scalar:g}**-0.5", "query_pre_attn_scalar"
    elif multiplier := values.number("attention_multiplier"):  # Granite
        scale, name = f"{multiplier:g}", "attention_multiplier"
    elif values["mup_use_scaling"] is True and head_dim:  # Phi-3-small
        scale, name = f"{values.number('mup_attn_multiplier') or 1:g}/{head_dim}", "mup_use_scaling"
    elif values["scale_attn_by_inverse_layer_idx"] is True:  # GPT-2
        scale, name = f"{default}/(layer + 1)", "scale_attn_by_inverse_layer_idx"
        scale = "1/(layer + 1)" if values["scale_attn_weights"] is False else scale
        where = " in layer 0, 1, ..."
    elif values["scale_attn_weights"] is False:  # GPT-2
        scale, name = "1.0", "scale_attn_weights"
    elif head_dim and (found := _yarn_mscale(values)):  # DeepSeek
        mscale, name = found
        scale = f"{head_dim**-0.5 * mscale**2:.6g}"
    else:
        return default, []
    if scale == default:
        return scale, []
    return scale, [f"pass softmax_scale={scale}{where}: {name} makes it another than the default"]


def _yarn_mscale(values: Values) -> tuple[float, str] | None:
    """The factor of q and of k in DeepSeek's variant of YaRN (Peng et al. 2023, section 3.4), and the key that has it.

    Only with MLA: elsewhere mscale_all_dim is the rotary embedding's alone.
    """
    name = values.name(("rope_parameters", "rope_scaling"))
    rope = values[name]
    if not isinstance(rope, dict) or not values["qk_nope_head_dim"]:
        return None
    if (rope.get("rope_type") or rope.get("type") or "default") == "default":
        return None
    inner = Values(rope, name)
    factor, weight = inner.number("factor"), inner.number("mscale_all_dim")
    return (0.1 * weight * math.log(factor) + 1, name) if weight and factor and factor > 1 else None


def _notes_on_masks(values: Values) -> list[str]:
    """On masks that a batch may need beyond the causal one."""
    notes = []
    architectures = values["architectures"] if isinstance(values["architectures"], list) else []
    bidirectional = (
        values["is_encoder_decoder"] is True
        or values["is_causal"] is False
        or values["use_bidirectional_attention"] in (True, "all")
        or any("MaskedLM" in str(name) for name in architectures)
        or (values["is_decoder"] is not True and values.whole("type_vocab_size", least=0) is not None)
    )
    if bidirectional:
        notes.append(
            "its tokens see each other both ways, so sequences of unequal lengths in one batch need a padding mask, "
            "which is not built: batch equal lengths (under a causal mask padding on the right needs none)"
        )
    images = "mm_tokens_per_image" if values.whole("mm_tokens_per_image", least=0) else ""  # Gemma 3
    if values["use_bidirectional_attention"] == "vision":  # Gemma 4
        images = "use_bidirectional_attention"
    if images:
        notes.append(
            f"{images}: the tokens of an image see each other both ways, and calls with images need that mask, which "
            "is not built; calls with text alone do not"
        )
    return notes


def _needs(values: Values, layers: Layers, seqlen: int | None, notes: list[str]) -> Iterator[Need]:
    """What the attention needs besides the kernels' own; adds to notes what is there and does not matter."""
    longest = seqlen or values.whole(*LONGEST)

    def local(name: str, kind: str, size: int, argument: str | None, sees: str) -> Iterator[Need]:
        if longest is not None and longest <= size:
            notes.append(f"{name} is {values[name]}, and sequences of up to {longest} tokens never reach it")
            return
        yield Need(
            kind,
            f"{name} is {values[name]}{layers.counted(kind.split()[0])}: {sees}",
            f"sequences of at most {size} tokens do not need it (--seqlen {size}); "
            "else torch.nn.attention.flex_attention for these layers",
            argument,
        )

    if cap := values.number(*SOFTCAP):
        yield Need(
            "softcap",
            f"{values.name(SOFTCAP)} is {cap:g}: every score s becomes {cap:g} * tanh(s / {cap:g})",
            "torch.nn.attention.flex_attention with that score_mod; leaving it out changes what the model computes",
            "softcap",
        )
    if _has_windows(values, layers) and (size := values.whole(*WINDOW)):
        name, sees = values.name(WINDOW), f"a query sees {size} keys only"
        if name == "local_attention":  # ModernBERT: half of it to either side, and the query's own key
            size, sees = size // 2 + 1, f"a query sees {size // 2} keys to either side"
        yield from local(name, "sliding window", size, "window_size", sees)
    if "local" in str(values["attention_types"] or values["attention_layers"]) and values.whole(
        "window_size"
    ):  # GPT-Neo
        size = values.whole("window_size")
        yield from local("window_size", "sliding window", size, "window_size", f"a query sees {size} keys only")
    if layers.may_have("chunked") and (size := values.whole("attention_chunk_size")):  # Llama 4
        sees = f"a query sees only the keys of its own {size} tokens"
        yield from local("attention_chunk_size", "chunked attention", size, None, sees)
    sinks = [name for name, value in values.of.items() if "attention_sink" in name and value]
    if "learnable_sink_init" in values.of:
        sinks.append("learnable_sink_init")
    if sinks:
        yield Need(
            "attention sinks",
            f"{values.source(sinks[0])}: a learned score for each head joins the sum of the softmax",
            "without gradients multiply out by torch.sigmoid(lse - sink), with lse from return_lse=True; "
            "to train, torch.nn.attention.flex_attention, likewise",
            "sinks",
        )
    # Baichuan's code alone tells: rotary positions in the models of 7B, whose width is 4096, and ALiBi in those of 13B.
    of_its_code = values["model_type"] == "baichuan" and values["hidden_size"] != 4096
    if values["alibi"] is True or values["position_embedding_type"] == "alibi" or of_its_code:
        yield Need(
            "ALiBi",
            "a bias that grows with the distance is added to the scores",
            "torch.nn.attention.flex_attention with that score_mod",
        )
    if (
        values.whole("relative_attention_num_buckets")  # T5
        or values.whole("position_bias_num_buckets")  # CPM-Ant
        or values.whole("rel_extent")  # Inkling
        or values["relative_attention"] is True  # DeBERTa, XLNet
        or values["position_embedding_type"] in ("relative_key", "relative_key_query")  # BERT
    ):
        yield Need(
            "score bias",
            "relative positions are added to the scores as a learned bias",
            "torch.nn.attention.flex_attention with that score_mod",
        )
    if values.whole("keep_window_size"):  # Doge
        yield Need(
            "additive mask",
            "keep_window_size: a mask that is computed from the values is added to the scores",
            "torch.nn.attention.flex_attention with that score_mod",
        )
    if values["prefix_lm"] is True:
        yield Need(
            "prefix mask",
            "the tokens of a prefix see each other both ways, the others are causal",
            "torch.nn.attention.flex_attention with that mask; calls without a prefix need causal=True only",
        )
    yield from _sparse(values, layers)
    dropout = DROPOUT
    if values.whole("relative_attention_num_buckets"):  # T5
        dropout += ("dropout_rate",)
    elif values["model_type"] == "xlnet":
        dropout += ("dropout",)
    if probability := values.number(*dropout):
        name = values.name(dropout)
        yield Need(
            "dropout",
            f"{name} is {probability:g}: training drops attention probabilities",
            f"set {name} to 0, which changes nothing in inference and regularises training less",
            only_training=True,
        )


def _sparse(values: Values, layers: Layers) -> Iterator[Need]:
    def need(because: str, way_out: str = "torch.nn.attention.flex_attention with that mask") -> Need:
        return Need("sparse attention", because, way_out)

    if layers.may_have("indexed", "sparse", "full") and (topk := values.whole("index_topk")):  # DeepSeek-V3.2
        yield need(f"index_topk is {topk}: each query sees the {topk} keys that an indexer picks", "")
    dense_every = values.whole("dense_attention_every_n_layers", least=0)
    if dense_every != 1 and any(value and name.startswith("blocksparse_") for name, value in values.of.items()):
        but = f", except in 1 of {dense_every} layers" if dense_every else ""
        yield need(f"keys blocksparse_...: a query sees only some blocks of keys{but}")  # Phi-3-small
    if values["attention_type"] == "block_sparse":  # BigBird
        full = "attention_type original_full, to which BigBird itself changes for short sequences"
        yield need("attention_type is block_sparse: a query sees only some blocks of keys", full)
    if values["attention_window"]:  # Longformer
        yield need("attention_window: a query sees the keys around it and a few chosen ones")


def _has_windows(values: Values, layers: Layers) -> bool:
    if values["use_sliding_window"] is False or not layers.may_have("sliding", "compressed"):  # DeepSeek-V4
        return False
    first, count = values["max_window_layers"], values["num_hidden_layers"]  # Qwen2: from the first of these on
    if not layers.kinds and values["use_sliding_window"] is True and isinstance(first, int) and isinstance(count, int):
        return first < count
    return True


def _add(found: list[Attention], new: Attention) -> None:
    """Appends it, or its part's name to an attention that is the same."""

    def what_counts(x: Attention) -> tuple:
        return x.heads, x.kv_heads, x.head_dim, x.head_dim_v, x.softmax_scale, x.needs

    for index, old in enumerate(found):
        if what_counts(old) == what_counts(new):
            # Some files say everything twice, at the top and in text_config: that is one part.
            twice = old.part == "model" and new.part in LANGUAGE
            found[index] = replace(
                old,
                part=old.part if twice else f"{old.part}, {new.part}",
                notes=tuple(dict.fromkeys(old.notes + new.notes)),
                not_looked_at=old.not_looked_at
                if twice
                else tuple(dict.fromkeys(old.not_looked_at + new.not_looked_at)),
            )
            return
    found.append(new)
