"""Reads from a model's config.json what its attention is: shapes, and what it does besides plain attention.

Each family of models has its own names for the same things. The names here are those that Hugging Face's
configurations use; a name that is known to none of them is an error, never a guess.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "num_query_heads"),
    "attention_heads",  # the vision part of Llama 3.2
)
DECODER_HEADS = ("decoder_attention_heads",)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads", "num_query_groups")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "d_kv", "d_head")
# embed_dim first: the vision part of Qwen2-VL has it beside a hidden_size that is the language model's.
HIDDEN_SIZE = ("embed_dim", "hidden_size", "n_embd", "d_model", "n_embed", "dim")
LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attention_dropout_prob")
SOFTCAP = (
    *("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_softcapping", "attention_logit_cap"),
    "max_attn_value",  # Grok-1
)
WINDOW = ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention")

# Their num_heads are not those of an attention.
NO_SOFTMAX = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
KNOWN_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
MOST = 2**63  # a number beyond it is no shape, and not every float holds it

LANGUAGE = ("text_config", "llm_config", "language_config")
GIVE_SHAPES = (
    "If it is a model's configuration, give its shapes: --hidden-size, --num-heads, --num-kv-heads, --head-dim"
)

# A config.json holds only what differs from the defaults of its class: what these families leave out is this
# (transformers, configuration_*.py).
DEFAULTS = {
    "big_bird": {"attention_type": "block_sparse"},
    "bigbird_pegasus": {"attention_type": "block_sparse"},
    "clip_text_model": {"hidden_size": 512, "num_attention_heads": 8},
    "clip_vision_model": {"hidden_size": 768, "num_attention_heads": 12},
    "gemma3_text": {"hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma4_text": {"hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gpt2": {"n_embd": 768, "n_head": 12, "attn_pdrop": 0.1},
    "llama": {"hidden_size": 4096, "num_attention_heads": 32},
    "mistral": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    "siglip_text_model": {"hidden_size": 768, "num_attention_heads": 12},
    "siglip_vision_model": {"hidden_size": 768, "num_attention_heads": 12},
}


class Unreadable(Exception):
    """The configuration cannot be read; the text says what is wrong with it."""


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
    softmax_scale: str  # an expression
    needs: tuple[Need, ...] = ()
    notes: tuple[str, ...] = ()
    not_looked_at: tuple[str, ...] = ()  # what else there is, of which nothing is known


class Values:
    """A configuration's values, looked up under several names and checked."""

    def __init__(self, config: dict, part: str) -> None:
        nested = config.get("attn_config")  # MPT, DBRX
        own = {**config, **nested} if isinstance(nested, dict) else config
        given = {name: value for name, value in own.items() if value is not None}
        defaults = DEFAULTS.get(str(own.get("model_type")), {})
        self.of = {**defaults, **given}
        self.part = part

    def __getitem__(self, name: str) -> object:
        return self.of.get(name)

    def name(self, names: tuple[str, ...]) -> str:
        """The first of these names that is set, or the first of all."""
        return next((name for name in names if name in self.of), names[0])

    def whole(self, *names: str, least: int = 1) -> int | None:
        return self._checked(names, int, "a whole number", least)

    def number(self, *names: str) -> float | None:
        return self._checked(names, int | float, "a number", 0)

    def _checked(self, names, kind, what, least):
        name = self.name(names)
        value = self.of.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < MOST:
            raise Unreadable(f"{self.part}: {name} is {value!r:.60}; it must be {what} from {least} to 2**63")
        return value


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
    return [replace(found[0], not_looked_at=found[0].not_looked_at + parts), *found[1:]]


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
    for name in sorted(nested, key=lambda name: name not in LANGUAGE):
        if depth < 4:  # Qwen-Omni has three
            yield from _parts(config[name], name if part == "model" else f"{part}.{name}", silent, depth + 1)


def _attentions(part: str, values: Values, seqlen: int | None) -> Iterator[Attention]:
    hidden_size = values.whole(*HIDDEN_SIZE)
    if values.name(DECODER_HEADS) in values.of and values.name(HEADS) in values.of:  # BART, Whisper
        for side, names in (("encoder", HEADS), ("decoder", DECODER_HEADS)):
            heads = values.whole(*names)
            label = side if part == "model" else f"{part}.{side}"
            yield _attention(label, values, seqlen, hidden_size, heads, heads)
        return
    heads = values.whole(*HEADS, *DECODER_HEADS)
    assert heads is not None
    attention = _attention(part, values, seqlen, hidden_size, heads, _kv_heads(values, heads))
    yield attention
    if (global_head_dim := values.whole("global_head_dim")) and global_head_dim != attention.head_dim:  # Gemma 4
        kv_heads = values.whole("num_global_key_value_heads") if values["attention_k_eq_v"] is True else None
        shapes = hidden_size, heads, kv_heads or attention.kv_heads
        yield _attention(f"{part}, global layers", values, seqlen, *shapes, head_dim=global_head_dim, windows=False)


def _kv_heads(values: Values, heads: int) -> int:
    if values["multi_query"] is True and values["new_decoder_architecture"] is not True:  # Falcon 7B, StarCoder
        return 1
    if values["multi_query_attention"] is True:  # ChatGLM
        return values.whole("multi_query_group_num") or 1
    if values.whole("kv_lora_rank") and values.whole("qk_nope_head_dim"):  # MLA: every head has its own key and value
        return heads
    return values.whole(*KV_HEADS) or heads


def _attention(part, values, seqlen, hidden_size, heads, kv_heads, head_dim=None, windows=True) -> Attention:
    nope, rope = (values.whole(f"qk_{kind}_head_dim", least=0) for kind in ("nope", "rope"))
    if head_dim is None and nope and rope is not None:  # MLA; a head_dim beside these is that of the rotary part
        head_dim, head_dim_v = nope + rope, values.whole("v_head_dim") or nope
    else:
        head_dim = head_dim_v = head_dim or values.whole(*HEAD_DIM) or _quotient(values, hidden_size, heads)
    scale, notes = _softmax_scale(values, head_dim)
    needs = tuple(_needs(values, seqlen, windows, notes))
    if (dtype := values["dtype"] or values["torch_dtype"]) in ("float32", "float64"):
        notes.append(f"the weights are {dtype}: cast the model to bfloat16 or float16, or run it under torch.autocast")
    others = sorted({str(kind) for kind in _layer_types(values)} - KNOWN_LAYERS)
    not_looked_at = tuple(f"{kind}{_layers(values, kind)} of {part}" for kind in others)
    shapes = heads, kv_heads, head_dim, head_dim_v, hidden_size
    return Attention(part, *shapes, scale, needs, tuple(notes), not_looked_at)


def _quotient(values: Values, hidden_size: int | None, heads: int) -> int | None:
    if hidden_size is None:
        raise Unreadable(
            f"{values.part}: it has {heads} heads, and none of {', '.join(HEAD_DIM + HIDDEN_SIZE)} to tell their size"
        )
    return hidden_size // heads if hidden_size % heads == 0 else None


def _softmax_scale(values: Values, head_dim: int | None) -> tuple[str, list[str]]:
    """The scale as an expression, and a note where it is not the default."""
    scale = f"{head_dim}**-0.5"
    if scalar := values.number("query_pre_attn_scalar"):  # Gemma 2 and 3
        if scalar == head_dim:
            return scale, []
        scale, name = f"{scalar:g}**-0.5", "query_pre_attn_scalar"
    elif multiplier := values.number("attention_multiplier"):  # Granite
        scale, name = f"{multiplier:g}", "attention_multiplier"
    elif values["mup_use_scaling"] is True and head_dim:  # Phi-3-small
        scale, name = f"{values.number('mup_attn_multiplier') or 1:g}/{head_dim}", "mup_use_scaling"
    elif values["model_type"] in ("t5", "mt5", "umt5", "gpt_neo"):
        scale, name = "1.0", "model_type"
    elif head_dim and (mscale := _yarn_mscale(values["rope_scaling"])):  # DeepSeek
        scale, name = f"{head_dim**-0.5 * mscale**2:.6g}", "rope_scaling"
    else:
        return scale, []
    return scale, [f"pass softmax_scale={scale}: {name} makes it another than the default"]


def _yarn_mscale(rope: object) -> float | None:
    """The factor of q and of k in DeepSeek's variant of YaRN (Peng et al. 2023, section 3.4)."""
    if not isinstance(rope, dict):
        return None
    values = Values(rope, "rope_scaling")
    factor, weight = values.number("factor"), values.number("mscale_all_dim")
    return 0.1 * weight * math.log(factor) + 1 if weight and factor and factor > 1 else None


def _needs(values: Values, seqlen: int | None, windows: bool, notes: list[str]) -> Iterator[Need]:
    """What the attention needs besides the kernels' own; adds to notes what is there and does not matter."""
    longest = seqlen or values.whole(*LONGEST)
    kinds = _layer_types(values)

    def has(kind: str) -> bool:
        return not kinds or any(kind in str(layer) for layer in kinds)

    def local(name: str, kind: str, size: int, argument: str | None, sees: str) -> Iterator[Need]:
        if longest is not None and longest <= size:
            notes.append(f"{name} is {values[name]}, and sequences of up to {longest} tokens never reach it")
            return
        yield Need(
            kind,
            f"{name} is {values[name]}{_layers(values, kind.split()[0])}: {sees}",
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
    if windows and _has_windows(values, kinds) and (size := values.whole(*WINDOW)):
        name, sees = values.name(WINDOW), f"a query sees {size} keys only"
        if name == "local_attention":  # ModernBERT: half of it to either side, and the query's own key
            size, sees = size // 2 + 1, f"a query sees {size // 2} keys to either side"
        yield from local(name, "sliding window", size, "window_size", sees)
    if "local" in str(values["attention_types"] or values["attention_layers"]) and values.whole(
        "window_size"
    ):  # GPT-Neo
        size = values.whole("window_size")
        yield from local("window_size", "sliding window", size, "window_size", f"a query sees {size} keys only")
    if windows and has("chunked") and (size := values.whole("attention_chunk_size")):  # Llama 4
        sees = f"a query sees only the keys of its own {size} tokens"
        yield from local("attention_chunk_size", "chunked attention", size, None, sees)
    sink = next((name for name, value in values.of.items() if "attention_sink" in name and value), None)
    if values["model_type"] == "gpt_oss" or sink:
        yield Need(
            "attention sinks",
            f"{sink or 'model_type gpt_oss'}: a learned score for each head joins the sum of the softmax",
            "without gradients multiply out by torch.sigmoid(lse - sink), with lse from return_lse=True; "
            "to train, torch.nn.attention.flex_attention, likewise",
            "sinks",
        )
    if values["alibi"] is True or values["model_type"] == "bloom" or values["position_embedding_type"] == "alibi":
        yield Need(
            "ALiBi",
            "a bias that grows with the distance is added to the scores",
            "torch.nn.attention.flex_attention with that score_mod",
        )
    if (
        values.whole("relative_attention_num_buckets")  # T5
        or values["relative_attention"] is True  # DeBERTa
        or values["model_type"] == "xlnet"
        or values["position_embedding_type"] in ("relative_key", "relative_key_query")  # BERT
    ):
        yield Need(
            "score bias",
            "relative positions are added to the scores as a learned bias",
            "torch.nn.attention.flex_attention with that score_mod",
        )
    yield from _sparse(values)
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


def _sparse(values: Values) -> Iterator[Need]:
    def need(because: str, way_out: str = "torch.nn.attention.flex_attention with that mask") -> Need:
        return Need("sparse attention", because, way_out)

    if topk := values.whole("index_topk"):  # DeepSeek V3.2
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


def _layer_types(values: Values) -> list:
    return values["layer_types"] if isinstance(values["layer_types"], list) else []


def _layers(values: Values, kind: str) -> str:
    """How many layers are of this kind, where the configuration lists them."""
    kinds = _layer_types(values)
    return f" in {sum(kind in str(layer) for layer in kinds)} of {len(kinds)} layers" if kinds else ""


def _has_windows(values: Values, kinds: list) -> bool:
    if values["use_sliding_window"] is False:
        return False
    if kinds:
        return any("sliding" in str(kind) for kind in kinds)
    first, layers = (
        values["max_window_layers"],
        values["num_hidden_layers"],
    )  # Qwen2: windows from the first of these on
    if values["use_sliding_window"] is True and isinstance(first, int) and isinstance(layers, int):
        return first < layers
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
                not_looked_at=old.not_looked_at if twice else old.not_looked_at + new.not_looked_at,
            )
            return
    found.append(new)
