"""Tensors with the strides that users come with: what is read in place, and what has to be copied first."""

import torch


def embed(x, fill, margin):
    """x as the middle of a larger buffer; head_dim's margin keeps 16-byte alignment."""
    margins = (1, margin, 1, 8)
    buffer = x.new_full([size + 2 * m for size, m in zip(x.shape, margins, strict=True)], fill)
    middle = buffer[tuple(slice(m, m + size) for size, m in zip(x.shape, margins, strict=True))]
    middle.copy_(x)
    assert not middle.is_contiguous()
    return middle


def last_dim_strided(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def misaligned_pointer(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def misaligned_strides(x):
    return torch.nn.functional.pad(x, (0, 1))[..., :-1]


def dims_reversed(x):
    return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def odd_strides_where_size_is_one(x):
    return x.as_strided(x.shape, (7, x.shape[3], 0, 1))


def expanded_batch(x):
    return x[:1].expand_as(x)


def expanded_heads(x):
    return x[:, :, :1].expand_as(x)


def expanded_seqlen(x):
    return x[:, :1].expand_as(x)


def overlapping_rows(x):
    return x.flatten().as_strided(x.shape, (16 * x.shape[1], 16, 8, 1))


VIEWS = [
    last_dim_strided,
    misaligned_pointer,
    misaligned_strides,
    dims_reversed,
    odd_strides_where_size_is_one,
    expanded_batch,
    expanded_heads,
    expanded_seqlen,
    overlapping_rows,
]
