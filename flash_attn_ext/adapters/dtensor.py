"""Sharding of the operators for DTensor, torch's tensors that are spread over a mesh of devices. Opt-in: `register` is
the only thing here that a program calls, and the first to import torch.distributed.tensor, which takes longer than all
of this package.

Heads are independent, and so are the sequences of a batch: a call on shards of either is a call on each device by
itself, without communication. Everything else is replicated first.
"""

import itertools
import math

import torch

import flash_attn_ext  # noqa: F401 (it registers the operators)

OPERATORS = {name: getattr(torch.ops.flash_attn_ext, name).default for name in ("forward", "backward")}


def register() -> None:
    """Makes the operators' sharding known to DTensor, forward and backward. Again is the same as once.

    After it the functions of this package take q, k and v that are DTensors, and every other tensor as a DTensor too.

    Raises:
        ImportError: this torch has no torch.distributed.
    """
    from torch.distributed.tensor.experimental import register_sharding

    for name, operator in OPERATORS.items():
        register_sharding(operator)(lambda *arguments, name=name: _shardings(name, arguments))


def _shardings(name: str, arguments) -> list:
    """The placements on one dimension of a mesh: pairs of a list of those of the results and one of those of all
    arguments, None of what is no tensor. DTensor takes that which moves the least, of equals the first."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    schema = OPERATORS[name]._schema
    given = dict(zip((argument.name for argument in schema.arguments), arguments, strict=False))
    q, k, sinks = (given.get(x) for x in ("q", "k", "sinks"))

    def sharding(of_tensors: dict, dsinks):
        """of_tensors: placements by the arguments' names; where none stands there, it is replicated."""
        places = {x: of_tensors.get(x, Replicate()) for x, value in given.items() if hasattr(value, "tensor_meta")}
        if name == "forward":
            results = [of_tensors.get(x, Replicate()) for x in ("out", "lse")]
        else:  # gradients that are not needed have no elements
            needs = given.get("needs", (True, True, True))
            results = [places[x] if needed else Replicate() for x, needed in zip("qkv", needs, strict=True)]
            results.append(Replicate() if sinks is None else dsinks)
        return results, [places.get(x) for x in given]

    shardings = [sharding({}, dsinks=Replicate())]
    if q.ndim == k.ndim == 4:
        names = ("q", "k", "v", "out", "dout", "lse", "dlse", "seqused_q", "seqused_k")
        shardings.append(sharding(dict.fromkeys(names, Shard(0)), dsinks=Partial()))
    if _divides(q.mesh, k.shape[-2]):
        of_q, of_k, of_lse = Shard(q.ndim - 2), Shard(k.ndim - 2), Shard(q.ndim - 3)
        by_heads = {"q": of_q, "out": of_q, "dout": of_q, "k": of_k, "v": of_k, "lse": of_lse, "dlse": of_lse}
        shardings.append(sharding(by_heads | {"sinks": Shard(0)}, dsinks=Shard(0)))
    return shardings


def _divides(mesh, kv_heads: int) -> bool:
    """Whether shards of KV heads are equal, so that each has all of its query heads: over any dimensions of the mesh,
    since one answer is for all of them. DTensor itself refuses to make more shards than there are heads."""
    sizes = range(1, mesh.ndim + 1)
    counts = [math.prod(some) for size in sizes for some in itertools.combinations(mesh.shape, size)]
    return min(counts) <= kv_heads and all(kv_heads % count == 0 for count in counts if count <= kv_heads)
