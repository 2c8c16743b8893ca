"""What `check` says of 50 open models. Their configurations keep what is about attention, as it was published."""

import json
from collections import Counter
from pathlib import Path

import pytest

from flash_attn_ext.cli import main, models

CONFIGS = Path(__file__).parent / "configs" / "models"
README = Path(__file__).parents[1] / "README.md"

WINDOW, SOFTCAP, SINKS = "sliding window", "softcap", "attention sinks"
OTHER_V = "q and k have head dim 192 and v has 128"

# By model: heads, KV heads and head dim (of q and k / of v) of every attention that differs, with the scale where it is
# not 1 / sqrt(head dim); the options that it uses; and what is missing, in check's words. Nothing: it runs and trains.
MODELS = {
    "apertus-8b": ("32 8 128", set(), []),
    "baichuan2-13b": ("40 40 128", set(), ["ALiBi"]),
    "bloom-7b1": ("32 32 128", set(), ["ALiBi"]),
    "command-r7b": ("32 8 128", {WINDOW}, []),
    "deepseek-v2-lite": ("16 16 192/128 at 0.114721", set(), [OTHER_V]),
    "deepseek-v3": ("128 128 192/128 at 0.135234", set(), [OTHER_V]),
    "deepseek-v3.2": ("128 128 192/128 at 0.135234", set(), [OTHER_V, "sparse attention"]),
    "dinov2-large": ("16 16 64", set(), []),
    "exaone-4-32b": ("40 8 128", {WINDOW}, []),
    "falcon-7b": ("71 1 64", set(), []),
    "gemma-2-9b": ("16 8 256", {SOFTCAP, WINDOW}, []),
    "gemma-3-4b": ("8 4 256, 16 16 72", {WINDOW}, []),
    "gemma-3n-e4b": (
        "8 2 256 at 1.0",
        {WINDOW},
        [
            "not looked at: audio_config, which does not give its number of heads",
            "not looked at: vision_config, which does not give its number of heads",
        ],
    ),
    "gemma-4-31b": (
        "32 16 256 at 1.0, 32 4 512 at 1.0, 16 16 72 at 1.0",
        {WINDOW},
        ["head dim 512 has no kernel"],
    ),
    "glm-4-9b": ("32 2 128", set(), []),
    "glm-4.5-air": ("96 8 128", set(), []),
    "gpt-neox-20b": ("64 64 96", set(), []),
    "gpt-oss-20b": ("64 8 64", {WINDOW, SINKS}, []),
    "gpt2": ("12 12 64", set(), ["dropout"]),
    "granite-3.3-8b": ("32 8 128 at 0.0078125", set(), []),
    "hunyuan-mt-7b": ("32 8 128", set(), []),
    "internlm3-8b": ("32 2 128", set(), []),
    "kimi-k2.5": ("64 64 192/128 at 0.14468, 16 16 72", set(), [OTHER_V]),
    "llama-2-7b": ("32 32 128", set(), []),
    "llama-3-8b": ("32 8 128", set(), []),
    "llama-4-scout": ("40 8 128, 16 16 88", set(), ["chunked attention"]),
    "magistral-small-2509": ("32 8 128, 16 16 64", set(), []),
    "mimo-v2-flash": ("64 4 192/128, 64 8 192/128", {WINDOW, SINKS}, [OTHER_V]),
    "minimax-m2": ("48 8 128", set(), []),
    "minimax-text-01": ("64 8 128", set(), ["not looked at: linear_attention in 70 of 80 layers of model"]),
    "ministral-3-8b": ("32 8 128, 16 16 64", set(), []),
    "mistral-7b": ("32 8 128", {WINDOW}, []),
    "mixtral-8x7b": ("32 8 128", set(), []),
    "modernbert-base": ("12 12 64", {WINDOW}, []),
    "mpt-7b": ("32 32 128", set(), ["ALiBi"]),
    "nemotron-nano-9b-v2": ("40 8 128", set(), ["not looked at: mamba in 27 of 56 layers of model"]),
    "olmo-2-7b": ("32 32 128", set(), []),
    "olmo-3-7b": ("32 32 128", {WINDOW}, []),
    "phi-2": ("32 32 80", set(), []),
    "phi-3-mini-4k": ("32 32 96", {WINDOW}, []),
    "phi-4": ("40 10 128", set(), []),
    "qwen2.5-vl-7b": ("28 4 128, 16 16 80", set(), []),
    "qwen3-0.6b": ("16 8 128", set(), []),
    "qwen3-next-80b-a3b": ("16 2 256", set(), ["not looked at: linear_attention in 36 of 48 layers of model"]),
    "qwen3.5-27b": (
        "24 4 256, 16 16 72",
        set(),
        ["not looked at: linear_attention in 48 of 64 layers of text_config"],
    ),
    "siglip-so400m": ("16 16 72", set(), []),
    "smollm3-3b": ("16 4 128", set(), []),
    "stablelm-3b": ("32 32 80", set(), []),
    "starcoder2-3b": ("24 2 128", {WINDOW}, ["dropout"]),
    "yi-34b": ("56 8 128", set(), []),
}


def shapes(attention):
    head_dim, head_dim_v = attention.head_dim, attention.head_dim_v
    both = f"{head_dim}" if head_dim == head_dim_v else f"{head_dim}/{head_dim_v}"
    scale = "" if attention.softmax_scale == f"{head_dim}**-0.5" else f" at {attention.softmax_scale}"
    return f"{attention.heads} {attention.kv_heads} {both}{scale}"


def missing(answer):
    """What check's answer as JSON names, in its order, once each."""
    of_parts = [
        what
        for part in answer["parts"]
        for what in [text.split(";")[0] for text in part["problems"]] + [need["name"] for need in part["not_built"]]
    ]
    return list(dict.fromkeys([*of_parts, *(f"not looked at: {what}" for what in answer["not_looked_at"])]))


def test_every_configuration_is_in_the_table():
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(MODELS) and len(MODELS) == 50


@pytest.mark.parametrize("name", MODELS)
def test_what_check_says_of(name, capsys):
    wanted_shapes, wanted_options, wanted_missing = MODELS[name]
    path = CONFIGS / f"{name}.json"
    read = models.read(json.loads(path.read_text()))
    assert ", ".join(map(shapes, read)) == wanted_shapes
    assert {need.name for attention in read for need in attention.needs} - set(wanted_missing) == wanted_options

    code = main(["check", str(path), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert missing(answer) == wanted_missing
    assert code == (1 if wanted_missing else 0)
    only_unknown = wanted_missing and all(what.startswith("not looked at") for what in wanted_missing)
    assert answer["trains"] is (None if only_unknown else not wanted_missing)
    assert answer["runs"] is (None if only_unknown else set(wanted_missing) <= {"dropout"})


def test_readme_counts_them():
    lists = [missing for _, _, missing in MODELS.values()]
    whole = sum(not missing for missing in lists)
    dropout = sum(missing == ["dropout"] for missing in lists)
    in_part = sum(bool(missing) and all(what.startswith("not looked at") for what in missing) for missing in lists)
    lacking = Counter(what for missing in lists for what in missing if not what.startswith("not") and what != "dropout")
    named = {OTHER_V: "another head dim of v", "head dim 512 has no kernel": "head dim 512"}
    words = ", ".join(f"{named.get(what, what)} ({count})" for what, count in lacking.most_common())
    said = " ".join(README.read_text().split())
    assert (
        f"Of {len(MODELS)} open models `check` says that {whole} run and train, {dropout} more once their dropout of "
        f"attention probabilities is set to 0, and {in_part} as far as it can look"
    ) in said
    assert f"The other {len(MODELS) - whole - dropout - in_part} need something that is not here: {words}" in said
