"""Training on the GPU: what torch puts around attention, and that a model learns as it does with torch's own."""

import itertools
import math
from functools import partial

import gpu
import pytest
import torch
import torch.nn.functional as F
from cases import TRAINING_HEAD_DIMS, both_dtypes
from gpu import normal
from gradients import assert_same, both_passes, by_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flash_attn_ext import flash_attn_func

pytestmark = gpu.needs_hopper

forward_operator = torch.ops.flash_attn_ext.forward.default


# torch around it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@both_dtypes
def test_autocast(given, dtype):
    """Inputs are cast, and their gradients are cast back."""
    inputs = [normal(2, 120, 3, 64, dtype=given) for _ in range(3)]
    (dout, *_), expected = both_passes(*(x.to(dtype) for x in inputs), causal=True)

    def attend(q, k, v):
        with torch.autocast("cuda", dtype=dtype):
            return flash_attn_func(q, k, v, causal=True)

    assert_same(by_autograd(attend, dout, *inputs), [x.to(given) for x in expected])


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(use_reentrant):
    (dout, *inputs, _, _), expected = both_passes(*(normal(2, 120, 3, 64) for _ in range(3)), causal=True)
    attend = partial(checkpoint, partial(flash_attn_func, causal=True), use_reentrant=use_reentrant)
    assert_same(by_autograd(attend, dout, *inputs), expected)


def test_selective_checkpoint_can_save_attention():
    dout, *inputs = (normal(2, 120, 3, 64) for _ in range(4))
    asked = {False: [], True: []}

    def policy(context, function, *args, **kwargs):
        asked[context.is_recompute].append(function)
        return CheckpointPolicy.MUST_SAVE if function is forward_operator else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True) + 1

    contexts = partial(create_selective_checkpoint_contexts, policy)
    attend = partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    assert_same(by_autograd(attend, dout, *inputs), by_autograd(layer, dout, *inputs))
    assert forward_operator in asked[False] and forward_operator in asked[True], "the policy was asked about attention"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    torch._dynamo.reset()

    def layer(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for seqlen in (120, 257) if backend == "aot_eager" else (257,):
        dout, *inputs = (normal(2, seqlen, 3, 128) for _ in range(4))
        expected = by_autograd(layer, dout, *inputs)
        assert_same(by_autograd(compiled, dout, *inputs), expected, "under torch.compile", seqlen)


# A step, and many ----------------------------------------------------------------------------------------------------


class Training:
    """Attention between two projections, in float32 with 16-bit attention, and SGD."""

    width = 256  # or what whole heads make of it

    def __init__(self, attention, head_dim):
        torch.manual_seed(1)
        width = self.width // head_dim * head_dim
        self.attention, self.head_dim = attention, head_dim
        shapes = (32, 3 * width), (width, 32)
        self.first = [torch.randn(shape, device="cuda") / shape[0] ** 0.5 for shape in shapes]
        self.weights = [x.clone().requires_grad_() for x in self.first]
        self.optimizer = torch.optim.SGD(self.weights, lr=0.5)

    def step(self, x, wanted):
        into, out_of = self.weights
        q, k, v = (x @ into).bfloat16().unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        loss = F.mse_loss(self.attention(q, k, v).flatten(2).float() @ out_of, wanted)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def restart(self):
        with torch.no_grad():
            for x, first in zip(self.weights, self.first, strict=True):
                x.copy_(first)
        self.optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("head_dim", TRAINING_HEAD_DIMS)
def test_cuda_graph_of_a_training_step(head_dim):
    """Forward, backward and optimizer captured once, and replayed on other data, train as they do without a graph."""
    batches = [(torch.randn(2, 300, 32, device="cuda"), torch.randn(2, 300, 32, device="cuda")) for _ in range(10)]
    training = Training(partial(flash_attn_func, causal=True), head_dim)
    losses = []
    for batch in batches:
        losses.append(training.step(*batch))
        training.optimizer.zero_grad(set_to_none=True)
    learnt = [x.detach() - first for x, first in zip(training.weights, training.first, strict=True)]

    x, wanted = (torch.full_like(tensor, math.nan) for tensor in batches[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what allocates or compiles once does it here
        for _ in range(3):
            training.step(*batches[0])
    torch.cuda.current_stream().wait_stream(stream)
    training.restart()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.step(x, wanted)
    for batch, expected in zip(batches, losses, strict=True):
        x.copy_(batch[0]), wanted.copy_(batch[1])
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for weight, first, change in zip(training.weights, training.first, learnt, strict=True):
        distance = torch.linalg.vector_norm(weight.detach() - first - change) / torch.linalg.vector_norm(change)
        assert distance < 2**-8, "more than roundings of dq, summed in another order"


class Transformer(torch.nn.Module):
    """Two layers of width 256: four heads of 64, then two of 128."""

    def __init__(self, attention, vocabulary, seqlen, width=256):
        super().__init__()
        self.attention = attention
        self.tokens = torch.nn.Embedding(vocabulary, width)
        self.places = torch.nn.Embedding(seqlen, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "norm": torch.nn.LayerNorm(width),
                    "qkv": torch.nn.Linear(width, 3 * width),
                    "out": torch.nn.Linear(width, width),
                    "mlp": torch.nn.Sequential(
                        torch.nn.LayerNorm(width),
                        torch.nn.Linear(width, 2 * width),
                        torch.nn.GELU(),
                        torch.nn.Linear(2 * width, width),
                    ),
                }
            )
            for _ in (64, 128)
        )
        self.last = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, vocabulary))

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places.weight
        for layer, head_dim in zip(self.layers, (64, 128), strict=True):
            q, k, v = layer["qkv"](layer["norm"](x)).unflatten(-1, (3, -1, head_dim)).unbind(2)
            x = x + layer["out"](self.attention(q, k, v).flatten(2))
            x = x + layer["mlp"](x)
        return self.last(x)


def sdpa(*backends):
    """torch's attention by these backends, for head dim 64 and 128."""

    def attention(q, k, v):
        with sdpa_kernel(backends[q.shape[-1] // 128]):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention


def repeating_tokens(batches, batch, seqlen, vocabulary):
    """A token is the one 5 places before, seen through a fixed permutation, or in a quarter of the cases any other."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(vocabulary, generator=generator)
    tokens = torch.randint(vocabulary, (batches, batch, seqlen), generator=generator)
    surprise = torch.rand(tokens.shape, generator=generator) < 0.25
    for i in range(5, seqlen):
        tokens[..., i] = torch.where(surprise[..., i], tokens[..., i], follows[tokens[..., i - 5]])
    return tokens


def loss_curve(attention, steps, device="cuda", batch=16, seqlen=257, vocabulary=32):
    torch.manual_seed(0)
    data = repeating_tokens(steps, batch, seqlen, vocabulary).to(device)
    model = Transformer(attention, vocabulary, seqlen - 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for tokens in data:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.skipif(not {64, 128} <= set(TRAINING_HEAD_DIMS), reason="the model has head dims 64 and 128")
def test_a_transformer_trains_as_with_sdpa():
    """200 steps in bf16: the curve is as close to those of torch's backends as they are to each other.

    Roundings grow into differences as training goes on, so what they make of themselves is the tolerance: two layers by
    three backends are six curves, and none of them is more right than another.
    """
    backends = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    theirs = [loss_curve(sdpa(*pair), 200) for pair in itertools.combinations_with_replacement(backends, 2)]
    ours = loss_curve(partial(flash_attn_func, causal=True), 200)
    assert ours[-20:].mean() < 0.6 * ours[0], "it learns"

    def distance(a, b):
        return (a - b).abs().mean().item()

    between_theirs = [distance(a, b) for a, b in itertools.combinations(theirs, 2)]
    to_theirs = [distance(ours, curve) for curve in theirs]
    assert min(to_theirs) <= 2 * max(between_theirs), f"{to_theirs}, and theirs among themselves {between_theirs}"
