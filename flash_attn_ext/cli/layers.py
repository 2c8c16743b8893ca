"""The layers of a model: which of them have attention, and which have the same."""

import re
from dataclasses import dataclass

from .values import HEAD_DIM, HEADS, KV_HEADS, Values

LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
SHAPE = (*HEADS, *KV_HEADS, *HEAD_DIM, "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank")

KNOWN_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
NO_MIXING = {"mlp", "moe"}  # layers in which no token sees another
HYBRID_LETTERS = {"M": "mamba", "*": "full_attention", "-": "mlp", "E": "moe"}  # Nemotron-H
# Where a file has such keys and no list of its layers, some of them mix tokens without a softmax.
OTHER_MIXERS = re.compile(r"mamba|^ssm_|^linear_(attn|num|key|conv)|^conv_L_cache$|^lru_width$")
MOST_LAYERS = 4096  # a longer list would be made up


@dataclass(frozen=True)
class Layers:
    """The kinds of some layers of a model, an element for each."""

    kinds: tuple[str, ...]  # empty: the file does not list them
    of_all: int  # how many the model has; 0: not known

    @classmethod
    def of(cls, values: Values) -> "Layers":
        kinds = _layer_kinds(values)
        return cls(kinds, len(kinds))

    def counted(self, word: str) -> str:
        """How many layers are of such a kind, where that is known."""
        count = sum(word in kind for kind in self.kinds)
        return f" in {count} of {self.of_all} layers" if count and self.of_all else ""

    def may_have(self, *words: str) -> bool:
        return not self.kinds or any(word in kind for kind in self.kinds for word in words)

    def label(self) -> str:
        kinds = dict.fromkeys(kind for kind in self.kinds if kind not in NO_MIXING)
        named = [kind for kind in kinds if kind in KNOWN_LAYERS] or list(kinds) or ["some"]
        return ", ".join(named)

    def not_looked_at(self, values: Values) -> list[str]:
        """What mixes tokens in another way than by an attention that is known here."""
        others = sorted(set(self.kinds) - KNOWN_LAYERS - NO_MIXING)
        if self.kinds:
            where = f"of {self.of_all} layers of {values.part}" if self.of_all else f"layers of {values.part}"
            return [f"{kind} in {self.kinds.count(kind)} {where}" for kind in others]
        keys = [name for name, value in values.of.items() if value and OTHER_MIXERS.search(name)]
        what = f"layers of {values.part} that mix tokens in another way"
        return [f"{what}: there are keys such as {keys[0]}, and no list of such layers"] if keys else []


def _layer_kinds(values: Values) -> tuple[str, ...]:
    """Of every layer; empty if the file does not say."""
    for name in ("layer_types", "layers_block_type"):
        if isinstance(values[name], list):
            return tuple(map(str, values[name]))
    if isinstance(letters := values["hybrid_override_pattern"], str):  # Nemotron-H
        return tuple(HYBRID_LETTERS.get(letter, letter) for letter in letters)
    if isinstance(switches := values["hybrid_layer_pattern"], list):  # MiMo-V2
        return tuple("sliding_attention" if switch else "full_attention" for switch in switches)
    if isinstance(switches := values["attn_type_list"], list):  # MiniMax
        return tuple("full_attention" if switch else "linear_attention" for switch in switches)
    count = values.whole(*LAYERS) or 0
    if not 0 < count < MOST_LAYERS:
        return ()
    if isinstance(pattern := values["block_types"], list) and pattern:  # RecurrentGemma
        pattern = ["sliding_attention" if kind == "attention" else str(kind) for kind in pattern]
        return tuple(pattern[layer % len(pattern)] for layer in range(count))
    other = "mamba" if any("mamba" in name for name in values.of) else "other"
    if period := values.whole("attn_layer_period"):  # Jamba
        attention = range(values.whole("attn_layer_offset", least=0) or 0, count, period)
    elif isinstance(listed := values["attn_layer_indices"], list):  # Bamba
        attention = listed
    elif isinstance(listed := values["full_attn_idxs"], list):  # LFM2
        attention, other = listed, "conv"
    elif period := values.whole("full_attention_interval"):  # Qwen3-Next
        attention, other = range(period - 1, count, period), "linear_attention"
    else:
        return ()
    return tuple("full_attention" if layer in attention else other for layer in range(count))


def groups_of(values: Values) -> list[tuple[Values, Layers]]:
    """The layers of a model by the shape of their attention, and the configuration of each group."""
    layers = Layers.of(values)
    of_each_layer = values["per_layer_config"] if isinstance(values["per_layer_config"], dict) else {}
    own = {
        int(layer): keys
        for layer, keys in of_each_layer.items()
        if re.fullmatch("[0-9]{1,4}", layer) and isinstance(keys, dict)
    }
    base = {name: value for name, value in values.of.items() if "swa_" not in name}
    of_sliding = {name.removeprefix("swa_"): value for name, value in values.of.items() if "swa_" in name}
    if (factor := values.whole("swa_kv_heads_factor")) and (kv_heads := values.whole(*KV_HEADS)):  # MiMo-V2
        of_sliding.setdefault("num_key_value_heads", factor * kv_heads)
    of_full = {}
    if not own and (head_dim := values.whole("global_head_dim")):  # Gemma 4
        kv_heads = values.whole("num_global_key_value_heads") if values["attention_k_eq_v"] is True else None
        of_full = {"head_dim": head_dim} | ({"num_key_value_heads": kv_heads} if kv_heads else {})
    kinds = layers.kinds
    if not kinds and (of_sliding or of_full):  # there are both, and how many of each is not known
        kinds = ("sliding_attention", "full_attention")
    elif not kinds and own and (count := values.whole(*LAYERS) or 0) < MOST_LAYERS:
        kinds = ("",) * count

    groups: dict[str, tuple[dict, list[str]]] = {}
    for layer, kind in enumerate(kinds):
        keys = of_sliding if "sliding" in kind else of_full if kind == "full_attention" else {}
        keys = {name: value for name, value in {**keys, **own.get(layer, {})}.items() if _shapes(name)}
        keys = {name: value for name, value in keys.items() if base.get(name) != value}
        groups.setdefault(repr(sorted(keys.items())), (keys, []))[1].append(kind)
    if len(groups) < 2:
        keys = next(iter(groups.values()))[0] if groups else {}
        return [(values.replaced({**values.of, **keys}), layers)]
    return [
        (values.replaced({**base, **keys}), Layers(tuple(filter(None, kinds)), layers.of_all))
        for keys, kinds in groups.values()
    ]


def _shapes(name: str) -> bool:
    """Whether a key can make the attention of some layers another than that of the rest."""
    return name in SHAPE or "sink" in name
