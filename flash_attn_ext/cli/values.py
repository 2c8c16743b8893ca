"""The values of a model's config.json: under which names families of models keep them, and what their files leave out.

The names are those that Hugging Face's configurations use.
"""

import copy

HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "num_query_heads"),
    "attention_heads",  # the vision part of Llama 3.2
    "vt_num_attention_heads",  # that of Kimi-K2.5
)
DECODER_HEADS = ("decoder_attention_heads",)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads", "num_query_groups")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "d_kv", "d_head")
# embed_dim first: the vision part of Qwen2-VL has it beside a hidden_size that is the language model's.
HIDDEN_SIZE = ("embed_dim", "hidden_size", "n_embd", "d_model", "n_embed", "dim", "vt_hidden_size")
LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attention_dropout_prob")
SOFTCAP = (
    *("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_softcapping", "attention_logit_cap"),
    "max_attn_value",  # Grok-1
)
WINDOW = ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention")

MOST = 2**63  # a number beyond it is no shape, and not every float holds it

# What the files of these families leave out: a config.json may hold only what differs from the defaults of its class,
# and some facts stand in the code of a model alone (transformers, configuration_*.py and modeling_*.py).
FAMILIES = {
    "big_bird": {"attention_type": "block_sparse"},
    "bigbird_pegasus": {"attention_type": "block_sparse"},
    "bloom": {"alibi": True},
    "clip_text_model": {"hidden_size": 512, "num_attention_heads": 8},
    "clip_vision_model": {"hidden_size": 768, "num_attention_heads": 12},
    "cpmant": {"prefix_lm": True},
    "deepseek_v4": {"attention_sinks": True},
    "flint": {"attention_sinks": True},
    "gemma3_text": {"hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "gemma4_audio": {"relative_attention": True},
    "gemma4_text": {
        **{"hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        "global_head_dim": 512,
    },
    "git": {"prefix_lm": True},
    "gpt2": {"n_embd": 768, "n_head": 12, "attn_pdrop": 0.1},
    "gpt_oss": {"attention_sinks": True},
    "granite_swa": {"attention_sinks": True},
    "granitemoe_swa": {"attention_sinks": True},
    "llama": {"hidden_size": 4096, "num_attention_heads": 32},
    "mimo_v2_flash": {"add_swa_attention_sink_bias": True, "swa_kv_heads_factor": 2},
    "mistral": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    "openai_privacy_filter": {"attention_sinks": True},
    "paligemma": {"prefix_lm": True},
    "siglip_text_model": {"hidden_size": 768, "num_attention_heads": 12},
    "siglip_vision_model": {"hidden_size": 768, "num_attention_heads": 12},
    "xlnet": {"relative_attention": True},
}


class Unreadable(Exception):
    """The configuration cannot be read; the text says what is wrong with it."""


class Values:
    """A configuration's values, looked up under several names and checked."""

    def __init__(self, config: dict, part: str) -> None:
        nested = config.get("attn_config")  # MPT, DBRX
        both = {**(nested if isinstance(nested, dict) else {}), **config}
        self.given = {name: value for name, value in both.items() if value is not None}
        self.of = {**FAMILIES.get(str(config.get("model_type")), {}), **self.given}
        self.part = part

    def __getitem__(self, name: str) -> object:
        return self.of.get(name)

    def name(self, names: tuple[str, ...]) -> str:
        """The first of these names that is set, or the first of all."""
        return next((name for name in names if name in self.of), names[0])

    def replaced(self, of: dict) -> "Values":
        """The same part with other values."""
        other = copy.copy(self)
        other.of = of
        return other

    def source(self, name: str) -> str:
        """What says so: this key of the file, or its family."""
        return name if name in self.given else f"model_type {self['model_type']}"

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
