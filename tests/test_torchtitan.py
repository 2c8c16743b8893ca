"""flash_attn_ext.adapters.torchtitan: torchtitan's modules and tiny models with the overrides against its own
attention, which is SDPA, or FlexAttention in plain PyTorch: what it has for packed documents by default needs a GPU.
"""

from dataclasses import dataclass

import pytest
import torch

from flash_attn_ext import cpu

pytest.importorskip("torchtitan.models.common.attention", reason="torchtitan is not installed", exc_type=ImportError)

from torch.nn.attention import flex_attention as flex  # noqa: E402
from torchtitan.config import Configurable  # noqa: E402
from torchtitan.config.override import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.distributed import activation_checkpoint  # noqa: E402
from torchtitan.models.common import attention as theirs  # noqa: E402
from torchtitan.models.common.config_utils import make_gqa_config  # noqa: E402
from torchtitan.models.common.rope import CosSinRoPE  # noqa: E402

from flash_attn_ext.adapters import torchtitan as adapter  # noqa: E402

NAME = adapter.__name__
WIDTH, HEADS, KV_HEADS, SEQLEN = 64, 4, 2, 24
INIT = {"weight": lambda x: torch.nn.init.normal_(x, std=0.3)}  # large, for scores that matter
# Two rows, of documents of 7, 1 and 16, and of 13 and 11 tokens.
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((7, 1, 16), (13, 11))])

each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def plain_flex_attention(monkeypatch):
    """torchtitan compiles FlexAttention, which has no gradients on the CPU then; torch refuses them without it too."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(theirs.FlexAttention, "_compiled_flex_attn", staticmethod(flex.flex_attention))
    monkeypatch.setattr(theirs, "_compiled_create_block_mask", flex.create_block_mask)


def overridden(config, name="varlen"):
    """The config in a tree, as torchtitan's trainer changes it."""
    apply_overrides(OverrideConfig(imports=[f"{NAME}.{name}"]), config)
    return config


def attention(inner):
    rope = CosSinRoPE.Config(dim=WIDTH // HEADS, max_seq_len=SEQLEN)
    return make_gqa_config(
        dim=WIDTH,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        wqkv_param_init=INIT,
        wo_param_init=INIT,
        inner_attention=inner,
        rope=rope,
    )


def built(*configs):
    """Modules with the same weights."""
    modules = [config.build() for config in configs]
    modules[0].init_states()
    for module in modules[1:]:
        module.init_states()
        module.load_state_dict(modules[0].state_dict())
    return modules


def assert_same(results, modules, inputs=()):
    """Results, and the gradients of their squares' sum."""
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
    assert results[0].abs().max() > 1e-2
    weights = [[*module.parameters(), *x] for module, x in zip(modules, inputs or [(), ()], strict=True)]
    gradients = [torch.autograd.grad(x.square().sum(), w) for x, w in zip(results, weights, strict=True)]
    for right, gradient in zip(*gradients, strict=True):
        scale = right.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(gradient / scale, right / scale, rtol=1e-4, atol=1e-4)


def masks(inner, window=None):
    """What torchtitan's models make of the positions for this attention."""
    if isinstance(inner, theirs.VarlenAttention.Config):
        return theirs.create_varlen_metadata_for_document(POSITIONS)
    mods = [theirs.get_causal_mask_mod(), theirs.get_efficient_causal_mask_mod_for_packed_document(POSITIONS)]
    mods += [theirs.get_sliding_window_mask_mod(window)] if window else []
    return theirs.create_attention_mask(
        flex.and_masks(*mods), len(POSITIONS), None, SEQLEN, SEQLEN, device="cpu", BLOCK_SIZE=128
    )


def assert_same_on_documents(configs, modules, window=None):
    x = torch.randn(2, SEQLEN, WIDTH)
    of_each = [masks(config.inner_attention, window) for config in configs]
    assert_same([module(x, mask, POSITIONS) for module, mask in zip(modules, of_each, strict=True)], modules)


def test_dense_attention():
    configs = attention(theirs.ScaledDotProductAttention.Config()), attention(theirs.ScaledDotProductAttention.Config())
    modules = built(configs[0], overridden(configs[1], "dense"))
    assert type(modules[1].inner_attention) is adapter.ScaledDotProductAttention
    x, positions = torch.randn(2, SEQLEN, WIDTH), torch.arange(SEQLEN).expand(2, -1)
    assert_same([module(x, None, positions) for module in modules], modules)


def test_dense_attention_that_is_not_causal():
    """Of queries and keys that differ in length."""
    q, k, v = (torch.randn(2, n, HEADS, 16) for n in (5, 9, 9))
    modules = [x.Config().build() for x in (theirs.ScaledDotProductAttention, adapter.ScaledDotProductAttention)]
    torch.testing.assert_close(*[module(q, k, v, scale=0.3, is_causal=False) for module in modules])
    with pytest.raises(ValueError, match="attention_masks must be None here"):
        modules[1](q, k, v, attention_masks=masks(theirs.VarlenAttention.Config()))
    with pytest.raises(ValueError, match="needs as many queries as keys"):
        modules[1](q, k, v)


@each("window", [None, 5])
def test_packed_documents(window):
    inner = theirs.VarlenAttention.Config(window_size=(window - 1, 0) if window else (-1, 0))
    configs = attention(theirs.FlexAttention.Config()), overridden(attention(inner))
    modules = built(*configs)
    assert type(modules[1].inner_attention) is adapter.VarlenAttention
    assert modules[1].inner_attention.window_size == inner.window_size
    assert_same_on_documents(configs, modules, window)


def test_under_compile():
    """In one graph, as torchtitan compiles each layer."""
    configs = attention(theirs.FlexAttention.Config()), overridden(attention(theirs.VarlenAttention.Config()))
    module, compiled = built(*configs)
    assert_same_on_documents(configs, [module, torch.compile(compiled, backend="aot_eager", fullgraph=True)])


def test_sinks_by_lse():
    """As gpt-oss has them in torchtitan: out * sigmoid(lse - sinks), whose gradient goes through lse too."""
    configs = theirs.FlexAttention.Config(), adapter.VarlenAttention.Config()
    modules = [config.build() for config in configs]
    inputs = [torch.randn(2, SEQLEN, n, 16) for n in (HEADS, KV_HEADS, KV_HEADS)] + [torch.randn(HEADS)]
    results, of_each = [], []
    for module, config in zip(modules, configs, strict=True):
        q, k, v, sinks = own = [x.clone().requires_grad_() for x in inputs]
        of_each.append(own)
        results.append(
            module(
                *(q, k, v),
                attention_masks=masks(config),
                scale=0.5,
                enable_gqa=True,
                out_transform=lambda out, lse, sinks=sinks: out * torch.sigmoid(lse - sinks).unsqueeze(-1),
            )
        )
    assert_same(results, modules, of_each)


@each("name, calls", [(None, 2), ("selective", 1)])
def test_selective_checkpointing(name, calls, monkeypatch):
    """torchtitan keeps the results of the operators that it knows."""
    seen, forward = [], cpu.forward

    def counted(q, k, v, options):
        seen.extend([1] if options.has_lengths() else [])  # else of one of the documents
        return forward(q, k, v, options)

    monkeypatch.setattr(cpu, "forward", counted)

    @dataclass(kw_only=True, slots=True)
    class Run(Configurable.Config):
        activation_checkpoint: Configurable.Config

    run = Run(activation_checkpoint=activation_checkpoint.SelectiveAC.Config())
    run = overridden(run, name) if name else run
    (module,) = built(overridden(attention(theirs.VarlenAttention.Config())))
    block = run.activation_checkpoint.build()._wrap_block(module)
    block(torch.randn(2, SEQLEN, WIDTH), masks(theirs.VarlenAttention.Config()), POSITIONS).sum().backward()
    assert len(seen) == calls


def models(family):
    """Those of torchtitan, whose training needs more of torch than its attention."""
    reason = "this torch is too old for torchtitan's models"
    return pytest.importorskip(f"torchtitan.models.{family}", reason=reason, exc_type=ImportError)


def test_a_step_of_llama():
    make = models("llama3")._debugmodel
    configs = [make(attn_backend="flex"), overridden(make(attn_backend="varlen"))]
    modules = built(*configs)
    tokens = torch.randint(configs[0].vocab_size, POSITIONS.shape)
    results = [
        module(tokens, positions=POSITIONS, attention_masks=module.get_attention_masks(POSITIONS)) for module in modules
    ]
    assert_same(results, modules)


@each("window", [None, 5])
def test_attention_of_gpt_oss(window):
    """Sinks are parameters, and in a tree of configs each layer has its window."""
    make = models("gpt_oss")._make_gptoss_attn_config
    rope = CosSinRoPE.Config(dim=16, max_seq_len=SEQLEN)
    sizes = {"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "head_dim": 16, "layer_id": 0, "rope": rope}
    configs = [make(**sizes, attn_backend=name, sliding_window_size=window) for name in ("flex", "varlen")]
    modules = built(configs[0], overridden(configs[1]))
    for parameters in zip(*(module.parameters() for module in modules), strict=True):
        torch.nn.init.normal_(parameters[0], std=0.3)
        parameters[1].data.copy_(parameters[0])
    assert_same_on_documents(configs, modules, window)
    assert modules[1].sinks.numel() == HEADS
