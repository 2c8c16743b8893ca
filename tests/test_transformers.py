"""flash_attn_ext.adapters.transformers: tiny random models with attn_implementation="fa_ext" against "eager"."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gpu import on_hopper

import flash_attn_ext

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from flash_attn_ext.adapters import transformers as adapter  # noqa: E402

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, for scores that matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 5
BOTH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {  # with what differs from SMALL
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, **BOTH},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **BOTH},
    "gemma3_text": {"head_dim": 16, **BOTH},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, **EXPERTS, **BOTH},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.4},
    "glm4": {"head_dim": 8},
    "starcoder2": {"sliding_window": WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "stablelm": {},
    "cohere": {},
    "cohere2": BOTH,
    "gpt_neox": {},
    "smollm3": {},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen2_moe": {  # its attention is not told the window
        **{"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        **{"use_sliding_window": True, **EXPERTS, **BOTH},
    },
}

each = pytest.mark.parametrize
each_family = each("family", FAMILIES)


def model_of(family, **others):
    """A model in float32 with "eager", and its copy with "fa_ext"."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **SMALL | FAMILIES.get(family, {}) | others)
    eager = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation(adapter.NAME)
    return eager, ours


@pytest.fixture(autouse=True)
def registered():
    adapter._warned.cache_clear()
    adapter.register()
    yield
    adapter.unregister()


@pytest.fixture
def calls(monkeypatch):
    """The names of our functions that were called."""
    names = []
    for name in ("flash_attn_func", "flash_attn_varlen_func"):

        def call(*arguments, of=getattr(flash_attn_ext, name), name=name, **options):
            names.append(name)
            return of(*arguments, **options)

        monkeypatch.setattr(flash_attn_ext, name, call)
    return names


def tokens(*shape):
    return torch.randint(3, SMALL["vocab_size"], shape)


def padding(side, lengths, seqlen):
    columns = torch.arange(seqlen)
    columns = columns if side == "right" else columns.flip(0)
    return (columns < torch.tensor(lengths)[:, None]).long()


def assert_same(x, expected, tolerance=2e-5):
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


def assert_same_step(eager, ours, used=None, **inputs):
    """Logits where they are used, loss, and the gradients of all parameters."""
    results = [model(**inputs, use_cache=False) for model in (eager, ours)]
    used = slice(None) if used is None else used.bool()
    assert_same(results[1].logits[used], results[0].logits[used])
    assert_same(results[1].loss, results[0].loss)
    gradients = [
        torch.autograd.grad(result.loss, list(model.parameters()), allow_unused=True)
        for result, model in zip(results, (eager, ours), strict=True)
    ]
    for name, expected, gradient in zip(dict(eager.named_parameters()), *gradients, strict=True):
        assert (expected is None) == (gradient is None), name
        if expected is not None:
            assert_same(gradient, expected, 1e-4)


# Families -------------------------------------------------------------------------------------------------------------


@each_family
def test_a_step(family, calls):
    inputs = tokens(2, 13)
    assert_same_step(*model_of(family), input_ids=inputs, labels=inputs)
    assert len(calls) == SMALL["num_hidden_layers"]


@each_family
@each("side", ["left", "right"])
def test_a_padded_step(family, side, calls):
    inputs, used = tokens(3, 13), padding(side, [13, 6, 9], 13)
    of_padding = used.roll(1, 1) * used == 0  # and what padding predicts
    labels = inputs.masked_fill(of_padding, -100)
    assert_same_step(*model_of(family), used, input_ids=inputs, attention_mask=used, labels=labels)
    assert calls == ["flash_attn_varlen_func"] * SMALL["num_hidden_layers"]


@each_family
def test_a_packed_step(family, calls):
    """As its documents by themselves, one after the other."""
    lengths = [7, 1, 9]
    inputs = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(x) for x in lengths])[None]
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = {"position_ids": positions}
    if family == "gpt_oss":  # it does not tell its mask function the positions
        packed |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 9, "max_length_k": 9}
    eager, ours = model_of(family)
    logits = ours(inputs, **packed, use_cache=False).logits
    assert calls == ["flash_attn_varlen_func"] * SMALL["num_hidden_layers"]
    alone = [eager(x, use_cache=False).logits for x in inputs.split(lengths, 1)]
    assert_same(logits, torch.cat(alone, 1))


@each_family
@each("cache", [None, "static"])
def test_generation(family, cache, calls):
    inputs, used = tokens(2, 7), padding("left", [7, 4], 7)
    eager, ours = model_of(family)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    expected, generated = (
        model.generate(inputs, attention_mask=used, **options, output_logits=True, return_dict_in_generate=True)
        for model in (eager, ours)
    )
    assert torch.equal(generated.sequences, expected.sequences)
    for logits, of_eager in zip(generated.logits, expected.logits, strict=True):
        assert_same(logits, of_eager)
    assert len(calls) == 8 * SMALL["num_hidden_layers"]
