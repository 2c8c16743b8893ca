"""flash_attn_ext.adapters.transformers: tiny random models with attn_implementation="fa_ext" against "eager"."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import on_hopper
from torch._dynamo.testing import EagerAndRecordGraphs

import flash_attn_ext

transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")

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
    eager = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation(adapter.NAME)
    return eager, ours


@pytest.fixture(autouse=True)
def registered():
    """On one thread: for tensors this small others only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    adapter._warned.cache_clear()
    adapter.register()
    yield
    adapter.unregister()
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """The names of our functions that were called."""
    names = []

    def counted(function):
        def call(*arguments, **options):
            names.append(function.__name__)
            return function(*arguments, **options)

        return call

    for function in (flash_attn_ext.flash_attn_func, flash_attn_ext.flash_attn_varlen_func):
        monkeypatch.setattr(flash_attn_ext, function.__name__, counted(function))
    return names


def tokens(*shape):
    return torch.randint(3, SMALL["vocab_size"], shape)


def padding(side, lengths, seqlen):
    columns = torch.arange(seqlen)
    columns = columns if side == "right" else columns.flip(0)
    return (columns < torch.tensor(lengths)[:, None]).long()


def assert_same(x, expected, tolerance=2e-5):
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


def assert_same_step(eager, ours, used=None, masks=(), **inputs):
    """Logits where they are used, loss, and the gradients of all parameters. masks: of either, in its own form."""
    masks = [{"attention_mask": mask} for mask in masks] or [{}, {}]
    results = [model(**inputs, **mask, use_cache=False) for model, mask in zip((eager, ours), masks, strict=True)]
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


@each("seed", range(60))
def test_masks_against_those_of_sdpa(seed):
    """Of any sizes and kinds, and what attention computes with them; where a query is padding nothing is looked at."""
    torch.manual_seed(seed)

    def below(n):
        return int(torch.randint(n, ()))

    past, queries, empty = below(2) * below(9), 1 + below(2) * below(7), below(2) * below(5)
    gone, batch = below(2) * below(past + 1), 1 + below(3)  # gone: keys that a sliding cache has dropped
    keys = past + queries - gone + empty
    functions = {
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(1 + below(6)),
        "chunk": masking_utils.chunked_causal_mask_function(1 + below(20), torch.zeros(batch, dtype=torch.int)),
    }
    function = list(functions.values())[seed % 3]
    used = torch.ones(batch, past + queries, dtype=torch.bool) if below(3) else None
    if used is not None and below(3):
        for row in used:
            row[: below(past + queries)] = False
            row[past + queries - below(2) * below(queries) :] = False
            row[below(past + queries)] &= below(4) > 0
    offset = torch.tensor(past) if empty and below(2) else past
    sizes = {"batch_size": batch, "q_length": queries, "kv_length": keys, "q_offset": offset, "kv_offset": gone}
    mask = adapter.mask(**sizes, mask_function=function, attention_mask=used)
    expected = masking_utils.sdpa_mask(
        **sizes, mask_function=function, attention_mask=used, allow_is_causal_skip=False
    ).expand(batch, 1, queries, keys)

    module, heads = torch.nn.Module(), 2
    module.config, module.is_causal = transformers.LlamaConfig(), True
    module.num_key_value_groups = 1
    q, k, v = (torch.randn(batch, heads, length, 8) for length in (queries, keys, keys))
    width = adapter._pattern(function).get("window")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, _ = adapter.attention(module, q, k, v, mask, sliding_window=width)
    rows = expected.any(-1)[:, 0]
    if used is not None and queries > 1:
        rows &= used[:, past:]
    by_sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=expected).transpose(1, 2)
    assert rows.any() or used is not None
    assert_same(out[rows], by_sdpa[rows])


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["ours", "where it falls back"])
def test_a_window_without_a_mask(dropout, calls):
    """Of a model that makes no masks by transformers' functions."""
    module = torch.nn.Module()
    module.config, module.is_causal, module.num_key_value_groups = SimpleNamespace(), True, 1
    q, k, v = torch.randn(3, 2, 4, 17, 8)
    out, _ = adapter.attention(module, q, k, v, None, dropout=dropout, sliding_window=5)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    expected = flash_attn_ext.flash_attn_func(*swapped, causal=True, window_size=(4, 0))
    torch.testing.assert_close(out, expected)


def test_positions_and_lengths_say_the_same(calls):
    """Also of two rows, each with documents of its own; the lengths are of both together."""
    _, ours = model_of("mistral")
    inputs, positions = tokens(2, 9), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1], [0, 0, 1, 2, 0, 1, 2, 3, 4]])
    edges = torch.tensor([0, 7, 9, 10, 13, 18], dtype=torch.int32)
    by_positions = ours(inputs, position_ids=positions, use_cache=False).logits
    by_lengths = ours(inputs, position_ids=positions, cu_seq_lens_q=edges, cu_seq_lens_k=edges, use_cache=False).logits
    assert_same(by_positions, by_lengths, 0)
    assert_same(by_positions[1, 1:4], ours(inputs[1:, 1:4], use_cache=False).logits[0])
    assert "flash_attn_varlen_func" in calls


@each("family", ["llama", "gemma2"])
@each("cache", [transformers.DynamicCache, transformers.StaticCache])
def test_a_prompt_in_parts(family, cache, calls):
    """Queries that are not the first ones, more than one at a time."""
    eager, ours = model_of(family)
    inputs, used = tokens(2, 14), padding("left", [14, 9], 14)
    results = []
    for model in (eager, ours):
        options = {"max_cache_len": 20} if cache is transformers.StaticCache else {}
        filled = cache(config=model.config, **options)
        parts = []
        for begin, end in ((0, 6), (6, 13), (13, 14)):
            parts.append(model(inputs[:, begin:end], attention_mask=used[:, :end], cache=filled).logits)
        results.append(torch.cat(parts, 1)[used.bool()])
    assert_same(*results)
    assert len(calls) == 3 * SMALL["num_hidden_layers"]


@each("mask", [None, "right"])
def test_an_encoder(mask, calls):
    """Not causal."""
    torch.manual_seed(1)
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    eager = transformers.BertModel._from_config(config, attn_implementation="eager")
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation(adapter.NAME)
    used = padding("right", [13, 6, 9], 13) if mask else torch.ones(3, 13, dtype=torch.long)
    inputs = tokens(3, 13)
    results = [x(inputs, attention_mask=used).last_hidden_state[used.bool()] for x in (eager, ours)]
    assert_same(*results)
    assert calls == [("flash_attn_varlen_func" if mask else "flash_attn_func")] * SMALL["num_hidden_layers"]


def test_cross_attention(calls):
    """Of queries that are not the last keys."""
    torch.manual_seed(1)
    sizes = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("ffn_dim", 32), ("attention_heads", 4))
    }
    config = transformers.BartConfig(vocab_size=96, d_model=32, **sizes, init_std=0.2, dropout=0.0)
    eager = transformers.BartForConditionalGeneration._from_config(config, attn_implementation="eager")
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation(adapter.NAME)
    inputs, used, outputs = tokens(3, 13), padding("right", [13, 6, 9], 13), tokens(3, 5)
    assert_same_step(eager, ours, input_ids=inputs, attention_mask=used, decoder_input_ids=outputs, labels=outputs)
    assert len(calls) == 3


# Training -------------------------------------------------------------------------------------------------------------


@each("family", ["llama", "gemma2"])
def test_gradient_checkpointing(family, calls):
    eager, ours = model_of(family)
    for model in (eager, ours):
        model.train()
        model.activation_checkpointing_enable()
    inputs = tokens(2, 13)
    assert_same_step(eager, ours, input_ids=inputs, labels=inputs)
    assert len(calls) == 2 * SMALL["num_hidden_layers"]


@each("checkpointing", [False, True])
def test_three_steps_of_a_trainer_on_packed_documents(checkpointing, tmp_path, calls):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    lengths = (9, 4, 13, 6, 8, 11)
    documents = [
        {"input_ids": document, "labels": document}
        for document in map(list, map(torch.Tensor.tolist, (tokens(x) for x in lengths)))
    ]
    losses = []
    for name, model in zip(("eager", "ours"), model_of("mistral"), strict=True):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            activation_checkpointing=checkpointing,
            dataloader_pin_memory=False,
        )
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=name == "ours")
        trainer = transformers.Trainer(model, arguments, train_dataset=documents, data_collator=collator)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0][2] != losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert calls == ["flash_attn_varlen_func"] * (3 * (1 + checkpointing) * SMALL["num_hidden_layers"])


# torch.compile --------------------------------------------------------------------------------------------------------


@each(
    "family, inputs",
    [("llama", "plain"), ("llama", "padded"), ("mistral", "padded"), ("llama", "packed"), ("mistral", "lengths")],
)
def test_under_compile(family, inputs):
    """In one graph where nothing has to be looked into."""
    eager, ours = model_of(family)
    torch._dynamo.reset()
    ids = tokens(1 if inputs in ("packed", "lengths") else 2, 13)
    arguments, used = {"input_ids": ids, "labels": ids, "use_cache": False}, torch.ones_like(ids)
    if inputs == "padded":
        used = padding("right", [13, 8], 13)
        arguments |= {"attention_mask": used, "labels": ids.masked_fill(used == 0, -100)}
    if inputs in ("packed", "lengths"):
        arguments |= {"position_ids": torch.cat([torch.arange(6), torch.arange(7)])[None]}
    expected = eager(**arguments)
    if inputs == "lengths":
        edges = torch.tensor([0, 6, 13], dtype=torch.int32)
        arguments |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    graphs = EagerAndRecordGraphs()
    fullgraph = family == "llama" and inputs == "padded"
    result = torch.compile(ours, backend=graphs, fullgraph=fullgraph)(**arguments)
    operators = [node.target for graph in graphs.graphs for node in graph.graph.nodes]
    assert operators.count(torch.ops.flash_attn_ext.forward.default) == SMALL["num_hidden_layers"]
    assert_same(result.logits[used.bool()], expected.logits[used.bool()])
    gradients = [torch.autograd.grad(x.loss, list(m.parameters())) for x, m in ((expected, eager), (result, ours))]
    for gradient, of_eager in zip(gradients[1], gradients[0], strict=True):
        assert_same(gradient, of_eager, 1e-4)


@each("family", ["llama", "gemma2"])
def test_compiled_generation(family):
    """With a static cache; transformers does so by itself on a GPU."""
    eager, ours = model_of(family)
    torch._dynamo.reset()
    inputs, used = tokens(2, 7), padding("left", [7, 4], 7)
    operators = []

    def backend(graph, _):  # a function, since options are copied
        operators.extend(node.target for node in graph.graph.nodes)
        return graph

    compiled = transformers.CompileConfig(backend=backend, mode=None)
    compiled._compile_all_devices = True
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": used}
    generated = ours.generate(inputs, **options, cache_implementation="static", compile_config=compiled)
    assert torch.equal(generated, eager.generate(inputs, **options))
    assert torch.ops.flash_attn_ext.forward.default in operators


def test_padding_with_gaps_under_compile():
    """What cannot be seen before the values are there is refused then."""
    _, ours = model_of("llama")
    torch._dynamo.reset()
    used = torch.tensor([[1, 1, 0, 1, 1]])
    with pytest.raises(RuntimeError, match="a padding mask with gaps"):
        torch.compile(ours, backend="eager", fullgraph=True)(tokens(1, 5), attention_mask=used, use_cache=False)


# Where it falls back --------------------------------------------------------------------------------------------------


def falls_back(reason):
    return pytest.warns(UserWarning, match=f"^fa_ext: {reason}.*; this attention is computed by SDPA or in plain")


OTHER_MASK = "the mask is neither causal, a sliding window, padding nor packed sequences"


@each("family", ["llama", "gemma2", "gpt_oss"])
@each("kind", ["prefix", "blocks"])
def test_a_mask_that_looks_ahead(family, kind, calls):
    """A prefix whose tokens see each other, as images' do. Without options it is SDPA's, with softcap or sinks not."""
    models, inputs = model_of(family), tokens(2, 13)
    blocks = torch.full((2, 13), -1)
    blocks[:, 2:6] = 0
    other = {
        "prefix": {"or_mask_function": lambda batch, head, q, k: (q < 6) & (k < 6)},
        "blocks": {"block_sequence_ids": blocks},
    }[kind]
    embedded = torch.empty(2, 13, 32)
    masks = [masking_utils.create_causal_mask(x.config, embedded, None, None, **other) for x in models]
    assert all(x.shape == (2, 1, 13, 13) for x in masks)
    with falls_back(OTHER_MASK):
        assert_same_step(*models, masks=masks, input_ids=inputs, labels=inputs)
    ahead, causal = (models[0](inputs, attention_mask=x, use_cache=False).logits for x in (masks[0], None))
    assert (ahead - causal).abs().max() > 0.01 and calls == []


@each("chunk, fallbacks", [(4, 1), (13, 0)])
def test_chunks(chunk, fallbacks, calls):
    """They are no other than a causal mask where there is only one."""
    sizes = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32}
    layers = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    eager, ours = model_of("llama4_text", attention_chunk_size=chunk, **sizes, **layers)
    inputs = tokens(2, 13)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same_step(eager, ours, input_ids=inputs, labels=inputs)
    assert [OTHER_MASK in str(x.message) for x in caught if "fa_ext" in str(x.message)] == [True] * fallbacks
    assert len(calls) == 2 - fallbacks


def test_a_window_with_gaps_in_the_padding(calls):
    eager, ours = model_of("mistral")
    used = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1]])
    inputs = tokens(2, 11)
    with falls_back(OTHER_MASK):
        results = [x(inputs, attention_mask=used, use_cache=False).logits[used.bool()] for x in (eager, ours)]
    assert_same(*results)
    assert calls == []


def test_masks_that_the_model_changes():
    """They have four dimensions."""
    _, ours = model_of("llama")
    embedded = torch.empty(2, 5, 32)
    mask = masking_utils.create_causal_mask(ours.config, embedded, None, None, allow_is_causal_skip=False)
    assert torch.equal(mask, torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5))
    mask = masking_utils.create_bidirectional_mask(ours.config, embedded, None, allow_is_bidirectional_skip=False)
    assert torch.equal(mask, torch.ones(2, 1, 5, 5, dtype=torch.bool))


def test_head_dims_of_v(calls):
    sizes = {
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
        **{"first_k_dense_replace": 2, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16},
    }
    eager, ours = model_of("deepseek_v3", **sizes)
    inputs, used = tokens(2, 13), padding("right", [13, 8], 13)
    labels = inputs.masked_fill(used == 0, -100)
    with falls_back("v has head dim 16 and q 24"):
        assert_same_step(eager, ours, used, input_ids=inputs, attention_mask=used, labels=labels)
    assert calls == []


@each("family", ["llama", "gemma2", "gpt_oss"])
def test_dropout_in_training(family, calls):
    """With the masks of padding and windows: without dropout the fallback computes the same."""
    eager, ours = model_of(family)
    inputs, used = tokens(2, 13), padding("right", [13, 8], 13)
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 1e-12  # so small that nothing is dropped
    ours.train()
    with falls_back("there is attention dropout"):
        logits = ours(inputs, attention_mask=used, use_cache=False).logits
    assert_same(logits[used.bool()], eager(inputs, attention_mask=used, use_cache=False).logits[used.bool()])
    assert calls == []
    ours.eval()
    ours(inputs, attention_mask=used, use_cache=False)
    assert len(calls) == SMALL["num_hidden_layers"]


@each("family", ["mistral", "gpt_oss"])
def test_packed_sequences_where_it_falls_back(family, calls):
    eager, ours = model_of(family)
    inputs, edges = tokens(1, 17), torch.tensor([0, 7, 8, 17], dtype=torch.int32)
    positions = torch.cat([torch.arange(x) for x in (7, 1, 9)])[None]
    packed = {"position_ids": positions, "cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 1e-12
    ours.train()
    with falls_back("there is attention dropout"):
        logits = ours(inputs, **packed, use_cache=False).logits
    alone = [eager(x, use_cache=False).logits for x in inputs.split([7, 1, 9], 1)]
    assert_same(logits, torch.cat(alone, 1))
    assert calls == []


def test_it_warns_once():
    _, ours = model_of("llama")
    inputs, mask = tokens(1, 5), torch.ones(1, 1, 5, 5, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ours(inputs, attention_mask=mask, use_cache=False)
    assert [OTHER_MASK in str(x.message) for x in caught] == [True]


def test_what_is_refused():
    module, x = torch.nn.Module(), torch.ones(1, 2, 3, 8)
    module.config = transformers.LlamaConfig()
    with pytest.raises(
        ValueError, match=r"attention_mask is torch.int64 of shape \(1, 3\); .* mask function of fa_ext"
    ):
        adapter.attention(module, x, x, x, torch.ones(1, 3, dtype=torch.int64))
    edges = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="give one of them"):
        adapter.attention(module, x, x, x, torch.ones(1, 3, dtype=torch.bool), cu_seq_lens_q=edges, cu_seq_lens_k=edges)
    with pytest.raises(ValueError, match="neither the call nor module.config its width"):
        adapter.attention(module, x, x, x, torch.ones(1, 3, dtype=adapter.WINDOW))


@each("name", adapter.REFUSED)
def test_arguments_that_are_refused(name):
    module, x = torch.nn.Module(), torch.ones(1, 2, 3, 8)
    adapter.attention(module, x, x, x, None, **{name: None})
    with pytest.raises(ValueError, match=f'^fa_ext has no {name}: take attn_implementation="sdpa", or "eager"'):
        adapter.attention(module, x, x, x, None, **{name: torch.zeros(1, 1)})


def test_sparse_attention_is_refused():
    sizes = {
        **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
        **{"first_k_dense_replace": 2, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16},
        **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    }
    _, ours = model_of("deepseek_v32", **sizes)
    with pytest.raises(ValueError, match="fa_ext has no indices"):
        ours(tokens(2, 13))


# Registration ---------------------------------------------------------------------------------------------------------


def test_it_is_opt_in():
    """Neither importing the package nor the adapter imports transformers; registering does, and can be undone."""
    program = """
import sys
import flash_attn_ext.adapters.transformers as adapter
print("transformers" in sys.modules)
adapter.register()
from transformers import AttentionInterface, AttentionMaskInterface
print(*("fa_ext" in of for of in (AttentionInterface(), AttentionMaskInterface())))
adapter.unregister()
print(*("fa_ext" in of for of in (AttentionInterface(), AttentionMaskInterface())))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(flash_attn_ext.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\nTrue True\nFalse False\n"


def test_registered_twice_is_registered_once():
    assert adapter.register() == adapter.register() == "fa_ext"
    assert ALL_ATTENTION_FUNCTIONS["fa_ext"] is adapter.attention
    assert ALL_MASK_ATTENTION_FUNCTIONS["fa_ext"] is adapter.mask
    adapter.unregister()
    adapter.unregister()
    assert "fa_ext" not in ALL_ATTENTION_FUNCTIONS and "fa_ext" not in ALL_MASK_ATTENTION_FUNCTIONS


# On a GPU -------------------------------------------------------------------------------------------------------------


@on_hopper
@each("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@each("inputs", ["plain", "padded", "packed"])
def test_on_a_gpu(family, inputs, calls):
    """In bf16, whose error is measured by eager's: it may be twice that, of float32's logits."""
    exact, ours = (
        x.cuda()
        for x in model_of(family, hidden_size=256, head_dim=64, max_position_embeddings=512, initializer_range=0.05)
    )
    eager, ours = copy.deepcopy(exact).bfloat16(), ours.bfloat16()
    ids = tokens(1 if inputs == "packed" else 2, 333).cuda()
    arguments, used = {"input_ids": ids, "use_cache": False}, torch.ones_like(ids)
    if inputs == "padded":
        used = padding("left", [333, 200], 333).cuda()
        arguments |= {"attention_mask": used}
    with_lengths = {}
    if inputs == "packed" and family != "gpt_oss":  # its eager attention knows no packed sequences
        arguments |= {"position_ids": torch.cat([torch.arange(100), torch.arange(233)])[None].cuda()}
        edges = torch.tensor([0, 100, 333], dtype=torch.int32, device="cuda")
        with_lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    expected = exact(**arguments).logits[used.bool()]
    errors = [
        (model(**arguments, **more).logits[used.bool()].float() - expected).abs().mean()
        for model, more in ((eager, {}), (ours, with_lengths))
    ]
    assert errors[1] <= 2 * errors[0]
    assert len(calls) == SMALL["num_hidden_layers"]
    ours.train()(**arguments, **with_lengths).logits.float().square().mean().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in ours.parameters())
