"""The command line: what `check` knows of models, and that every command says what it should, with its exit code.

What runs and trains is taken from the table, so that these tests hold for every version of it.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import HEAD_DIMS, ROWS, needs_kernels
from gpu import on_hopper

import flash_attn_ext
from flash_attn_ext import limits
from flash_attn_ext.cli import check, info, main, models, selftest, show, table

CONFIGS = Path(__file__).parent / "configs"
MODELS = CONFIGS / "models"
PLACE = Path(flash_attn_ext.__file__).parents[1]  # where a subprocess finds the same package, installed or not
DIMS = table.head_dims()

# Heads, KV heads, head dim; and what else it needs: for keys that no file of configs/models has (test_models.py).
FAMILIES = {
    "falcon 7b": ({"hidden_size": 4544, "n_head": 71, "multi_query": True, "alibi": False}, (71, 1, 64), set()),
    "falcon 40b": (
        {
            "hidden_size": 8192,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "multi_query": True,
            "new_decoder_architecture": True,
        },
        (128, 8, 64),
        set(),
    ),
    "bloom": ({"model_type": "bloom", "n_embed": 4096, "n_head": 32}, (32, 32, 128), {"ALiBi"}),
    "mpt": (
        {"d_model": 4096, "n_heads": 32, "attn_config": {"alibi": True, "attn_pdrop": 0, "kv_n_heads": 4}},
        (32, 4, 128),
        {"ALiBi"},
    ),
    "t5": (
        {
            "model_type": "t5",
            "d_model": 512,
            "d_kv": 64,
            "num_heads": 6,
            "relative_attention_num_buckets": 32,
            "dropout_rate": 0.1,
        },
        (6, 6, 64),
        {"score bias", "dropout"},
    ),
    "bert": (
        {"hidden_size": 768, "num_attention_heads": 12, "attention_probs_dropout_prob": 0.1},
        (12, 12, 64),
        {"dropout"},
    ),
    "chatglm": (
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "kv_channels": 128,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
        },
        (32, 2, 128),
        set(),
    ),
    "gpt-neo": (
        {
            "model_type": "gpt_neo",
            "hidden_size": 2048,
            "num_heads": 16,
            "attention_types": [[["global", "local"], 12]],
            "window_size": 256,
        },
        (16, 16, 128),
        {"sliding window"},
    ),
    "phi-3-small": (
        {
            "model_type": "phi3small",
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "blocksparse_block_size": 64,
            "dense_attention_every_n_layers": 2,
        },
        (32, 8, 128),
        {"sparse attention"},
    ),
    "phi-3-small, all of its layers dense": (
        {"head_dim": 128, "num_heads": 32, "blocksparse_block_size": 64, "dense_attention_every_n_layers": 1},
        (32, 32, 128),
        set(),
    ),
    "big bird": (
        {"model_type": "big_bird", "hidden_size": 768, "num_attention_heads": 12},
        (12, 12, 64),
        {"sparse attention"},
    ),
    "big bird with full attention": (
        {"model_type": "big_bird", "hidden_size": 768, "num_attention_heads": 12, "attention_type": "original_full"},
        (12, 12, 64),
        set(),
    ),
    "longformer": (
        {"hidden_size": 768, "num_attention_heads": 12, "attention_window": [512] * 12},
        (12, 12, 64),
        {"sparse attention"},
    ),
    "xlnet": (
        {"model_type": "xlnet", "d_model": 1024, "n_head": 16, "dropout": 0.1},
        (16, 16, 64),
        {"score bias", "dropout"},
    ),
    "bert with relative keys": (
        {"hidden_size": 768, "num_attention_heads": 12, "position_embedding_type": "relative_key"},
        (12, 12, 64),
        {"score bias"},
    ),
    "grok-1": (
        {"hidden_size": 6144, "num_attention_heads": 48, "num_key_value_heads": 8, "max_attn_value": 30.0},
        (48, 8, 128),
        {"softcap"},
    ),
    "llama 3.2's vision": ({"hidden_size": 1280, "attention_heads": 16}, (16, 16, 80), set()),
    "null head dim": (
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None},
        (32, 8, 128),
        set(),
    ),
    "deepseek with a rotary head_dim": (
        {
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "kv_lora_rank": 512,
            "head_dim": 64,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        (16, 16, 192),
        set(),
    ),
}

# The whole answer: part, heads, KV heads, head dims of q and of v, scale, needs; what is not looked at, what is noted.
MLA = ("model", 16, 16, 192, 128)
PADDING = "need a padding mask"
ANSWERS = {
    "deepseek-v2-rope-parameters": ([(*MLA, "0.114721", set())], [], "softmax_scale=0.114721: rope_parameters"),
    "deepseek-v3-rope-parameters": ([(*MLA, "0.135234", set())], [], "softmax_scale=0.135234: rope_parameters"),
    "deepseek-v3-default-rope": ([(*MLA, "192**-0.5", set())], [], ""),
    "gemma-4": (
        [
            ("text_config, sliding_attention", 8, 4, 256, 256, "1.0", {"sliding window"}),
            ("text_config, full_attention", 8, 2, 512, 512, "1.0", set()),
        ],
        [],
        "calls with images need that mask",
    ),
    "gemma-4-global-head-dim": (
        [
            ("model, sliding_attention", 8, 4, 256, 256, "1.0", {"sliding window"}),
            ("model, full_attention", 8, 2, 512, 512, "1.0", set()),
        ],
        [],
        "softmax_scale=1.0",
    ),
    "zamba-2": (
        [("model", 8, 8, 128, 128, "(128/2)**-0.5", set())],
        ["hybrid in 1 of 4 layers of model", "linear_attention in 3 of 4 layers of model"],
        "softmax_scale=(128/2)**-0.5",
    ),
    "gpt2-inverse-layers": (
        [("model", 8, 8, 64, 64, "64**-0.5/(layer + 1)", set())],
        [],
        "softmax_scale=64**-0.5/(layer + 1) in layer 0, 1, ...",
    ),
    "doge": ([("model", 4, 2, 128, 128, "128**-0.5", {"additive mask"})], [], ""),
    "mimo-v2": (
        [
            ("model, full_attention", 32, 4, 192, 128, "192**-0.5", set()),
            ("model, sliding_attention", 32, 8, 192, 128, "192**-0.5", {"sliding window", "attention sinks"}),
        ],
        [],
        "",
    ),
    "deepseek-v4": (
        [("model", 32, 1, 512, 512, "512**-0.5", {"sliding window", "attention sinks", "sparse attention"})],
        [
            "compressed_sparse_attention in 1 of 3 layers of model",
            "heavily_compressed_attention in 2 of 3 layers of model",
        ],
        "",
    ),
    "jamba": ([("model", 16, 8, 128, 128, "128**-0.5", set())], ["mamba in 14 of 16 layers of model"], ""),
    "bamba": ([("model", 16, 8, 128, 128, "128**-0.5", set())], ["mamba in 10 of 12 layers of model"], ""),
    "nemotron-h": (
        [("model", 16, 8, 128, 128, "128**-0.5", set())],
        ["linear_attention in 2 of 5 layers of model"],
        "",
    ),
    "nemotron-h-letters": ([("model", 16, 8, 128, 128, "128**-0.5", set())], ["mamba in 2 of 5 layers of model"], ""),
    "falcon-h1": (
        [("model", 8, 2, 128, 128, "128**-0.5", set())],
        [
            "layers of model that mix tokens in another way: "
            "there are keys such as mamba_d_ssm, and no list of such layers"
        ],
        "",
    ),
    "recurrent-gemma": (
        [("model", 8, 1, 128, 128, "128**-0.5", {"sliding window"})],
        ["recurrent in 4 of 5 layers of model"],
        "",
    ),
    "dbrx": ([("model", 16, 4, 128, 128, "128**-0.5", set())], [], ""),
    "mpt": ([("model", 8, 8, 128, 128, "0.125", {"ALiBi"})], [], "softmax_scale=0.125: softmax_scale"),
    "granite-swa": (
        [("model", 8, 2, 128, 128, "0.0078125", {"sliding window", "attention sinks"})],
        [],
        "softmax_scale=0.0078125: attention_multiplier",
    ),
    "paligemma": ([("text_config", 8, 1, 128, 128, "128**-0.5", {"prefix mask"})], [], ""),
    "hrm-text": ([("model", 8, 8, 128, 128, "128**-0.5", {"prefix mask"})], [], ""),
    "bert": ([("model", 8, 8, 64, 64, "64**-0.5", set())], [], PADDING),
}

# What is said of each part of a model, and what of it cannot be looked at.
TWELVE_HEADS = {"hidden_size": 768, "num_attention_heads": 12}
PARTS = {
    "whisper": (
        {"d_model": 384, "encoder_attention_heads": 6, "decoder_attention_heads": 6},
        ["encoder, decoder"],
        [],
    ),
    "bart with heads of two sizes": (
        {"d_model": 384, "encoder_attention_heads": 6, "decoder_attention_heads": 3},
        ["encoder", "decoder"],
        [],
    ),
    "siglip": (
        {"text_config": {"model_type": "siglip_text_model"}, "vision_config": {"model_type": "siglip_vision_model"}},
        ["text_config, vision_config"],
        [],
    ),
    "said twice": (TWELVE_HEADS | {"text_config": TWELVE_HEADS}, ["model"], []),
    "another scale": (
        {"text_config": TWELVE_HEADS | {"attention_multiplier": 0.5}, "vision_config": TWELVE_HEADS},
        ["text_config", "vision_config"],
        [],
    ),
    "a part without heads": (
        {"text_config": TWELVE_HEADS, "vision_config": {"hidden_size": 2048}},
        ["text_config"],
        ["vision_config, which does not give its number of heads"],
    ),
    "a part by its type alone": (
        {"text_config": TWELVE_HEADS, "vision_config": {"model_type": "some_vision_model"}},
        ["text_config"],
        ["vision_config, which does not give its number of heads"],
    ),
    "no part": ({**TWELVE_HEADS, "quantization_config": {"quant_method": "fp8"}}, ["model"], []),
    "layers of another kind": (
        TWELVE_HEADS | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        ["model"],
        ["linear_attention in 2 of 3 layers of model"],
    ),
}

LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192}
WINDOWS = {  # keys beside LLAMA's; whether they ask for a window
    "none": ({}, False),
    "null": ({"sliding_window": None}, False),
    "switched off": ({"sliding_window": 4096, "use_sliding_window": False}, False),
    "on": ({"sliding_window": 4096, "use_sliding_window": True}, True),
    "from a layer on that there is not": (
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 32, "num_hidden_layers": 32},
        False,
    ),
    "no layer of that type": ({"sliding_window": 4096, "layer_types": ["full_attention"] * 4}, False),
    "as long as the model": ({"sliding_window": 8192}, False),
    "longer than the model": ({"sliding_window": 262144}, False),
}


def names(attention):
    return {need.name for need in attention.needs}


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys, *arguments):
    code, stdout, _ = run(capsys, *arguments, "--json")
    return code, json.loads(stdout)


# ---- the table without the compiled module ----


@needs_kernels
def test_the_written_table_is_the_compiled_one():
    from flash_attn_ext._limits_table import TABLE

    assert TABLE == limits.TABLE


def test_a_table_that_cannot_be_read_fails_the_build(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import limits_table

    source = limits_table.HEADER.read_text()
    assert limits_table.parse(source) == table.rows()
    for broken in (source.replace(".forward = {", ".forward = Plan{", 1), source.replace("kLimits[]", "kOther[]"), ""):
        with pytest.raises(ValueError, match="csrc/limits.h"):
            limits_table.parse(broken)


# ---- check ----


@pytest.mark.parametrize("name", ANSWERS)
def test_whole_answers(name):
    parts, not_looked_at, note = ANSWERS[name]
    read = models.read(json.loads((CONFIGS / f"{name}.json").read_text()))
    assert [(a.part, a.heads, a.kv_heads, a.head_dim, a.head_dim_v, a.softmax_scale, names(a)) for a in read] == parts
    assert [what for a in read for what in a.not_looked_at] == not_looked_at
    notes = [text for a in read for text in a.notes]
    assert any(note in text for text in notes) if note else not notes


def test_layers_of_another_kind_make_the_answer_a_part(capsys):
    code, stdout, _ = run(capsys, "check", CONFIGS / "jamba.json")
    assert code == 1 and "not looked at: mamba in 14 of 16 layers" in stdout and "What was looked at" in stdout


def test_a_learned_scale_is_not_guessed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(limits, "TABLE", rows_where((64, 128)))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma4_audio", "hidden_size": 800, "num_attention_heads": 8}))
    _, answer = json_of(capsys, "check", path)
    assert answer["parts"][0]["softmax_scale"] is None
    assert "the scale is not known" in (words := run(capsys, "check", path)[1]) and "100**-0.5" not in words


def test_code_of_its_own_was_not_read(tmp_path, capsys):
    config = json.loads((MODELS / "llama-3-8b.json").read_text())
    for name, told in (("AutoConfig", False), ("AutoModelForCausalLM", True)):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config | {"auto_map": {name: "code_x.X"}}))
        _, answer = json_of(capsys, "check", path)
        assert any("was not read (code_x.X)" in note for note in answer["parts"][0]["notes"]) == told


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_models(family):
    config, shapes, features = FAMILIES[family]
    attention = models.read(config)[0]
    assert (attention.heads, attention.kv_heads, attention.head_dim) == shapes
    assert names(attention) == features


@pytest.mark.parametrize("keys", WINDOWS)
def test_windows(keys):
    config, wanted = WINDOWS[keys]
    assert names(models.read(LLAMA | config)[0]) == ({"sliding window"} if wanted else set())


def test_a_window_beyond_seqlen_does_not_matter():
    config = LLAMA | {"sliding_window": 4096}
    assert names(models.read(config, seqlen=4097)[0]) == {"sliding window"}
    short = models.read(config, seqlen=4096)[0]
    assert names(short) == set() and "never reach it" in " ".join(short.notes)


def test_a_window_to_either_side():
    """ModernBERT's local_attention is both sides together: with 128, a token sees the 64 before and the 64 after it."""
    config = LLAMA | {"local_attention": 128}
    for seqlen in (8192, 128, 66):
        (need,) = models.read(config, seqlen)[0].needs
        assert "local_attention is 128: a query sees 64 keys to either side" in need.because
        assert "--seqlen 65)" in need.way_out
    assert not models.read(config, seqlen=65)[0].needs


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model(monkeypatch, tmp_path, capsys, name):
    config, parts, not_looked_at = PARTS[name]
    read = models.read(config)
    assert [attention.part for attention in read] == parts

    monkeypatch.setattr(limits, "TABLE", rows_where((64, 128)))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    code, answer = json_of(capsys, "check", path)
    assert answer["not_looked_at"] == not_looked_at and [part["part"] for part in answer["parts"]] == parts
    _, stdout, _ = run(capsys, "check", path)
    if not_looked_at:
        assert code == 1 and answer["runs"] is answer["trains"] is None
        assert "What was looked at runs and trains." in stdout and not_looked_at[0] in " ".join(stdout.split())
    else:
        assert code == 0 and answer["runs"] is answer["trains"] is True and "It runs and trains." in stdout


@pytest.mark.parametrize(
    "forward, backward, stops", [((), (), (True, True)), ((128,), (), (False, True)), ((128,), (128,), (False, False))]
)
def test_an_option_counts_as_built_where_the_kernels_have_it(monkeypatch, forward, backward, stops):
    attention = models.read(LLAMA | {"attn_logit_softcapping": 50.0})[0]
    monkeypatch.setitem(limits.OPTIONS, "softcap", {"forward": forward, "backward": backward})
    answer = check.judge(attention)
    assert ("softcap" in answer.stops_forward, "softcap" in answer.stops_backward) == stops
    assert [need.name for need in answer.needs] == (["softcap"] if any(stops) else [])


def test_scales_that_are_not_the_default():
    heads = {"num_attention_heads": 32, "head_dim": 128}
    assert models.read(heads)[0].softmax_scale == "128**-0.5"
    gemma_2_27b = models.read(heads | {"query_pre_attn_scalar": 144})[0]
    assert gemma_2_27b.softmax_scale == "144**-0.5" and "softmax_scale=144**-0.5" in gemma_2_27b.notes[0]
    phi_3_small = models.read(heads | {"mup_use_scaling": True, "mup_attn_multiplier": 2.0})[0]
    assert phi_3_small.softmax_scale == "2/128" and "softmax_scale=2/128" in phi_3_small.notes[0]
    deepseek = models.read(json.loads((MODELS / "deepseek-v3.json").read_text()))[0]
    assert float(deepseek.softmax_scale) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-5)


def test_padding_says_what_it_costs(capsys):
    """The kernels that 104 runs on fill it up to 128."""
    code, answer = json_of(capsys, "check", "--hidden-size", 3200, "--num-heads", 32)
    ways_out = {way["change"]: way for way in answer["parts"][0]["ways_out"]}
    full = limits.row_of(104)["head_dim"]
    assert code == 1 and ways_out["pad 100 to 104"]["costs"].startswith(f"{full - 100} % more")
    assert ways_out["pad 100 to 104"]["backward"] == (104 in DIMS["backward"])
    words = run(capsys, "check", "--head-dim", 100)[1]
    assert "pad 100 to 104" in words and "softmax_scale=100**-0.5 and keep out's first 100 columns" in words


def test_new_models_fill_the_kernels(monkeypatch):
    """Other head dims would run as well, and multiply by zeros."""
    monkeypatch.setattr(limits, "TABLE", rows_where((64, 128)))
    (attention,) = models.read({"hidden_size": 2560, "num_attention_heads": 25})
    changes = [way.change for way in check.judge(attention).ways_out]
    assert changes[:-1] == ["a new model: 20 heads of 128", "a new model: 40 heads of 64"]


@pytest.mark.parametrize("head_dim", [72, 80, 96, 192])
def test_head_dims_between_rows_run_and_train(capsys, head_dim):
    code, answer = json_of(capsys, "check", "--head-dim", head_dim, "--num-heads", 16)
    assert code == 0 and answer["runs"] and answer["trains"] and not answer["parts"][0]["ways_out"]


def rows_where(trains):
    """Rows up to 64, 128 and 256, of which some train."""
    ends = {64: 8, 128: 72, 256: 136}
    return [
        {"head_dim": d, "smallest": ends[d], "step": 8, "forward": {"block_q": 64}, "backward": d in trains or None}
        for d in ends
    ]


@pytest.mark.parametrize(
    "trains, head_dim, changes",
    [
        ((64, 128), 128, []),
        ((64, 128), 96, []),
        ((64, 128), 100, ["pad 100 to 104"]),
        ((64, 128), 160, []),  # nothing larger trains
        ((64, 128), 130, ["pad 130 to 136"]),
        ((64, 256), 100, ["pad 100 to 104", "pad 100 to 136"]),  # one to run, another to train
        ((64, 256), 96, ["pad 96 to 136"]),
        ((64, 256), 512, []),
    ],
)
def test_what_to_pad_to(monkeypatch, trains, head_dim, changes):
    monkeypatch.setattr(limits, "TABLE", rows_where(trains))
    (attention,) = models.read({"num_attention_heads": 1, "head_dim": head_dim})
    answer = check.judge(attention)
    assert [way.change for way in answer.ways_out if way.change.startswith("pad")] == changes
    assert (answer.runs, answer.trains) == tuple(limits.has_pass(which, head_dim) for which in ("forward", "backward"))


def test_exit_code_of_a_model_that_runs_and_trains(monkeypatch, capsys):
    monkeypatch.setattr(limits, "TABLE", rows_where((64, 128)))
    code, stdout, _ = run(capsys, "check", MODELS / "llama-3-8b.json")
    assert code == 0 and "runs and trains" in stdout


def test_dropout_is_a_switch_and_no_lack_of_kernels(monkeypatch, capsys):
    monkeypatch.setattr(limits, "TABLE", rows_where((64,)))
    code, stdout, _ = run(capsys, "check", MODELS / "gpt2.json")
    row = next(line.split() for line in stdout.splitlines() if line.startswith("model"))
    assert code == 1 and row == "model 12 12 64 yes yes, without dropout".split()
    assert "set attn_pdrop to 0" in stdout and "It does not train as it is." in stdout
    monkeypatch.setattr(limits, "TABLE", rows_where(()))
    assert "no: head dim, dropout" in run(capsys, "check", MODELS / "gpt2.json")[1]


def test_kv_heads_that_do_not_divide(capsys):
    code, stdout, _ = run(capsys, "check", "--hidden-size", 4096, "--num-heads", 32, "--num-kv-heads", 5)
    assert code == 1 and "32 heads are no multiple of 5 KV heads" in stdout


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "not JSON"),
        ("not json", "not JSON"),
        (b"\xff\xfe\x00", "not text"),
        ("[1, 2]", "list"),
        ("{}", "empty"),
        ('{"pets": "cat"}', "pets"),
        ('{"hidden_size": 4096}', "no attention found"),
        ('{"num_attention_heads": 32}', "to tell their size"),
        ('{"hidden_size": 4096, "num_attention_heads": "many"}', "num_attention_heads is 'many'"),
        ('{"hidden_size": 4096, "num_attention_heads": 0}', "a whole number from 1"),
        ('{"hidden_size": 4096, "num_attention_heads": true}', "num_attention_heads is True"),
        ('{"hidden_size": 4096, "num_attention_heads": [8, 16]}', "num_attention_heads is [8, 16]"),
        ('{"hidden_size": 4096, "num_attention_heads": 32, "attention_dropout": NaN}', "attention_dropout is nan"),
        ('{"text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64, "num_heads": 1}}', "text_config"),
        ("[" * 100_000, "JSON|deeply"),
        ('{"num_heads": 1, "head_dim": ' + "9" * 5000 + "}", "too many digits|2**63"),
        ('{"num_heads": 1, "head_dim": ' + "9" * 400 + "}", "2**63"),
        ('{"num_heads": 1, "hidden_size": 64, "attention_dropout": 1e999}', "attention_dropout is inf"),
        (
            '{"num_heads": 8, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, '
            '"rope_scaling": {"type": "yarn", "factor": 2, "mscale_all_dim": 1e200}}',
            "mscale_all_dim",
        ),
        ('{"model_type": "mamba2", "num_heads": 128, "head_dim": 64}', "a mamba2, which has no softmax attention"),
        ('{"text_config": {"model_type": "llama", "num_attention_heads": "\\u001b[2J"}}', "'\\x1b[2J'"),
        ('{"\\u001b[2J": 1}', "its keys: \\x1b[2J"),
    ],
)
def test_nonsense_is_told(tmp_path, capsys, text, says):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for argument in (path, tmp_path):
        code, stdout, stderr = run(capsys, "check", argument)
        assert code == 2 and stdout == "" and any(word in stderr for word in says.split("|")), stderr
        assert str(path) in stderr and stderr.count("\n") == 1 and "\x1b" not in stderr


HUB_CACHES = {  # the variables that place the hub's cache, by precedence, and where it is then
    "HF_HUB_CACHE": "",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "huggingface/hub",
    "HOME": ".cache/huggingface/hub",
}


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    for name in HUB_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))


def put_model(cache, model, *snapshots, main=None):
    folder = cache / f"models--{model.replace('/', '--')}"
    for number, (commit, config) in enumerate(snapshots):
        path = folder / "snapshots" / commit / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(config))
        os.utime(path, (number, number))
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)


@pytest.mark.parametrize("variable", HUB_CACHES)
def test_a_model_by_its_name_is_found_in_the_hubs_cache(no_hub, monkeypatch, tmp_path, capsys, variable):
    monkeypatch.setenv(variable, str(tmp_path))
    put_model(tmp_path / HUB_CACHES[variable], "meta-llama/Llama-3.1-8B", ("abc", LLAMA | {"model_type": "llama"}))
    _, stdout, _ = run(capsys, "check", "meta-llama/Llama-3.1-8B")
    words = " ".join(stdout.split())
    assert words.startswith("meta-llama/Llama-3.1-8B, from ") and "/snapshots/abc/config.json (llama), on a" in words


@pytest.mark.parametrize("main, head_dim", [(None, 64), ("older", 128), ("gone", 64)])
def test_which_snapshot_of_a_model(no_hub, monkeypatch, tmp_path, capsys, main, head_dim):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    heads = {"num_attention_heads": 8}
    put_model(tmp_path, "gpt2", ("older", heads | {"head_dim": 128}), ("newer", heads | {"head_dim": 64}), main=main)
    assert json_of(capsys, "check", "gpt2")[1]["parts"][0]["head_dim"] == head_dim


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "gpt2"])
def test_a_model_that_is_not_in_the_hubs_cache(no_hub, monkeypatch, tmp_path, capsys, model):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    code, stdout, stderr = run(capsys, "check", model)
    assert code == 2 and stdout == "" and stderr.startswith(f"check: {model}: no such file")
    assert str(tmp_path) in stderr and f"hf download {model} config.json" in stderr


def test_a_file_goes_before_a_model_of_its_name(no_hub, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    put_model(tmp_path / "cache", "gpt2", ("abc", {"num_attention_heads": 8, "head_dim": 64}))
    (tmp_path / "gpt2").write_text(json.dumps({"num_attention_heads": 8, "head_dim": 128}))
    assert json_of(capsys, "check", "gpt2")[1]["parts"][0]["head_dim"] == 128


def test_a_byte_order_mark_is_no_mistake(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert json_of(capsys, "check", path)[1]["parts"][0]["head_dim"] == 128


def test_input_that_is_not_there(capsys):
    assert run(capsys, "check", "nowhere.json")[::2] == (2, "check: nowhere.json: no such file\n")
    assert run(capsys, "check")[0] == 2
    assert run(capsys, "check", MODELS / "gpt2.json", "--head-dim", 64)[0] == 2
    with pytest.raises(SystemExit) as error:
        main(["check", "--head-dim", "-1"])
    assert error.value.code == 2


# ---- what is shown ----


TABLE_OF_TEXT = (
    ["part", ">KV heads", "backward", "what it costs"],
    [["vision_config", "16", "no: head dim, sliding window", "33 % more work, and memory for q, k, v, out"]] * 2,
)


@pytest.mark.parametrize("with_rich", [True, False])
@pytest.mark.parametrize(
    "width, is_table", [(120, True), (80, True), (59, True), (58, False), (40, False), (20, False)]
)
def test_a_narrow_terminal_cuts_nothing_off(monkeypatch, capsys, width, is_table, with_rich):
    monkeypatch.setattr(show, "_width", lambda: width)
    if not with_rich:
        monkeypatch.setattr(show, "Console", None)
    show.table(*TABLE_OF_TEXT)
    stdout = capsys.readouterr().out
    assert all(len(line) <= width for line in stdout.splitlines()), stdout
    header, rows = TABLE_OF_TEXT
    wanted = [word for cell in [*header, *rows[0], *rows[1]] for word in cell.removeprefix(">").split()]
    if not is_table:
        wanted += [word for name in header for word in name.removeprefix(">").split()]  # beside each row's cells
    assert sorted(re.sub("[;─]", "", stdout).split()) == sorted(wanted)
    assert ("; KV heads 16;" not in " ".join(stdout.split())) == is_table


@pytest.mark.parametrize("with_rich", ["", "sys.modules['rich'] = None; "])
@pytest.mark.parametrize("encoding, accent", [("ascii", "\\xe8"), ("utf-8", "è")])
def test_names_that_no_terminal_should_get(tmp_path, with_rich, encoding, accent):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_name_or_path": "\x1b[31mred\ud800\nmodèle", "num_heads": 1, "head_dim": 100}))
    arguments = ["check", str(path)]
    start = f"import sys; {with_rich}from flash_attn_ext.cli import main; sys.exit(main({arguments}))"
    process = python(start, PYTHONIOENCODING=encoding, PYTHONUTF8="1")
    assert process.returncode == 1 and process.stderr == ""
    assert process.stdout.startswith(f"\\x1b[31mred\\ud800 mod{accent}le, on a Hopper GPU")


# ---- the commands as processes ----


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment,
        cwd=PLACE,
        capture_output=True,
        text=True,
    )


def test_check_reads_standard_input():
    command = [sys.executable, "-m", "flash_attn_ext", "check", "-"]
    process = subprocess.run(command, input='{"model_type": "gpt2"}', cwd=PLACE, capture_output=True, text=True)
    assert process.returncode == 1 and "standard input (gpt2)" in process.stdout and "dropout" in process.stdout


@pytest.mark.parametrize("arguments", [["info"], ["check", str(MODELS / "deepseek-v3.json")]])
def test_plain_text_without_rich(arguments):
    start = f"import sys; sys.modules['rich'] = None; from flash_attn_ext.cli import main; sys.exit(main({arguments}))"
    process = python(start)
    assert process.stderr == "" and process.returncode == (arguments[0] == "check")
    assert all(len(line) <= 120 for line in process.stdout.splitlines()), process.stdout
    assert "─" not in process.stdout and "head dim" in process.stdout


@pytest.mark.parametrize("command", ["info", "check", "selftest", "bench"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "Exit code: " in capsys.readouterr().out


def test_info_has_everything_a_bug_report_needs(capsys):
    code, facts = json_of(capsys, "info")
    assert code == 0 and facts["flash_attn_ext"] == flash_attn_ext.__version__ and facts["torch"] == torch.__version__
    assert facts["head_dims"] == DIMS
    words = run(capsys, "info")[1]
    assert all(f"{name}  " in words for name in ("torch", "driver", "GPU kernels", "CUDA tensors"))


def test_selftest_of_the_cpu_path():
    process = python("import sys; from flash_attn_ext.cli import main; sys.exit(main(['selftest', '--device', 'cpu']))")
    assert process.returncode == 0 and "All " in process.stdout, process.stdout + process.stderr


@pytest.mark.skipif(limits.is_available(), reason="the kernels run here")
def test_without_a_gpu_the_commands_say_so(capsys):
    code, stdout, stderr = run(capsys, "selftest", "--device", "cuda")
    assert code == 1 and stdout == "" and limits.why_unavailable()[:40] in stderr
    if not torch.cuda.is_available():
        code, stdout, stderr = run(capsys, "bench", "--json")
        assert code == 1 and stdout == "" and "no CUDA device" in stderr


def test_bench_looks_at_its_options_first(capsys):
    code, stdout, stderr = run(capsys, "bench", "--heads", 3, "--kv-heads", 2)
    assert code == 2 and stdout == "" and "--heads 3 is no multiple of --kv-heads 2" in stderr


def test_bench_of_a_shape_that_does_not_fit(monkeypatch, capsys):
    def randn(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", randn)
    code, stdout, stderr = run(capsys, "bench", "--batch", 512, "--seqlen", 65536, "--heads", 8, "--kv-heads", 2)
    assert code == 1 and stdout == ""
    assert "batch 512, 65536 tokens, 8 heads (2 KV heads) of 128" in stderr and "--batch" in stderr


@pytest.mark.parametrize("device", ["foo", "mps", "cuda:", "cuda:-1", "cuda:999", "cuda:x", ""])
def test_devices_that_selftest_does_not_know(capsys, device):
    with pytest.raises(SystemExit) as stop:
        main(["selftest", "--device", device])
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and repr(device) in message and "cpu, cuda" in message and len(message) < 160


def test_a_copy_that_was_never_installed_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(limits, "TABLE", [])
    for arguments, wanted in ((["selftest", "--device", "cpu"], 1), (["check", "--head-dim", 64, "--num-heads", 1], 2)):
        code, stdout, stderr = run(capsys, *arguments)
        assert code == wanted and stdout == "" and stderr.startswith(f"{arguments[0]}: ") and "make build" in stderr


def test_selftest_goes_on_after_an_exception(monkeypatch, capsys):
    def broken(row, dtype, device, seed):
        raise RuntimeError(f"broken for {row['head_dim']}\nand more")

    monkeypatch.setattr(selftest, "test_row", broken)
    code, stdout, _ = run(capsys, "selftest", "--device", "cpu")
    assert code == 1 and stdout.count("WRONG") == 2 * len(ROWS)
    for head_dim in HEAD_DIMS:
        assert f"head dim {head_dim}, bfloat16: RuntimeError: broken for {head_dim}\n" in stdout


def test_info_says_once_that_there_are_no_kernels():
    device = {"name": "GPU", "compute_capability": "9.0", "memory_gib": 80, "multiprocessors": 132}
    facts = info.collect() | {"kernels_missing": "not built.", "unavailable": "cannot run: not built."}
    lines = info.in_words(facts | {"devices": [device | {"device": "cuda:0", "unavailable": "cannot run: not built."}]})
    assert [name for name, text in lines.items() if "not built." in text] == ["GPU kernels"]
    assert lines["CUDA tensors"] == "refused: no GPU kernels" and lines["cuda:0"].endswith(": refused: no GPU kernels")


def test_selftest_finds_wrong_results(monkeypatch, capsys):
    """A wrong element of out, an lse that is off, and a NaN."""
    row = {"head_dim": 64, "forward": {"block_q": 64, "block_kv": 64}, "backward": True}
    true = flash_attn_ext.flash_attn_func

    def wrong(break_it):
        def attention(*args, **kwargs):
            out, lse = true(*args, **kwargs)
            return break_it(out.clone(), lse.clone())

        monkeypatch.setattr(selftest, "flash_attn_func", attention)
        results = selftest.test_row(row, torch.bfloat16, torch.device("cpu"), seed=0)
        return {c.name for comparisons in results.values() for c in comparisons if not c.within}

    def one_element(out, lse):
        return out.index_put(tuple(torch.tensor([i]) for i in (0, 1, 1, 5)), torch.tensor([9.0], dtype=out.dtype)), lse

    assert wrong(lambda out, lse: (out, lse)) == set()
    assert wrong(one_element) >= {"out"}
    assert wrong(lambda out, lse: (out, lse + 1e-3)) == {"lse"}
    assert wrong(lambda out, lse: (out * 1.1, lse)) >= {"out", "dq", "dk", "dv"}
    assert wrong(lambda out, lse: (out * torch.nan, lse)) >= {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("option", limits.OPTIONS)
def test_selftest_finds_an_option_that_does_nothing(monkeypatch, option):
    row = {"head_dim": 64, "forward": {"block_q": 64, "block_kv": 64}, "backward": True}

    def attend(q, k, v, **options):
        kept = {name: x for name, x in options.items() if not name.startswith(option)}
        if option == "sinks" and "sinks" in options:
            kept["sinks"] = 0 * options["sinks"]
        if option == "cu_seqlens" and q.dim() == 3:
            out, lse = (x[0] for x in flash_attn_ext.flash_attn_func(q[None], k[None], v[None], **kept))
        else:
            out, lse = flash_attn_ext.flash_attn_varlen_func(q, k, v, **kept)
        return out, lse.detach().requires_grad_() if option == "dlse" else lse

    monkeypatch.setattr(selftest, "flash_attn_func", attend)
    monkeypatch.setattr(selftest, "flash_attn_varlen_func", attend)
    results = selftest.test_row(row, torch.bfloat16, torch.device("cpu"), seed=0)
    assert {name for name, comparisons in results.items() if not all(c.within for c in comparisons)} == {option}


@on_hopper
def test_selftest_and_bench_on_the_gpu(capsys):
    code, stdout, _ = run(capsys, "selftest")
    assert code == 0 and "The GPU kernels on" in stdout
    assert all(("dq" in stdout) or not row["backward"] for row in limits.TABLE)
    assert all(
        (f"{name}: " in stdout) == bool(by_pass.get("forward", by_pass["backward"]))
        for name, by_pass in limits.OPTIONS.items()
    )
    code, figures = json_of(capsys, "bench", "--head-dim", 96, "--seqlen", 1024, "--rounds", 2)
    assert code == 0 and {"flash_attn_ext"} <= {figure["implementation"] for figure in figures["figures"]}


# ---- importing ----


def test_importing_is_quick():
    """Under 50 ms beyond torch's own import, by the best of several, as other programs may run beside."""
    code = """
import time, torch
begin = time.perf_counter()
import flash_attn_ext
print(time.perf_counter() - begin)
assert not [name for name in __import__("sys").modules if name.startswith("flash_attn_ext.cli")]
"""
    seconds = []
    for _ in range(5):
        process = python(code)
        assert process.returncode == 0, process.stderr
        seconds.append(float(process.stdout))
        if seconds[-1] < 0.05:
            break
    assert min(seconds) < 0.05, seconds
