"""Attention for torchtitan, as overrides of its attention modules. Importing this module imports torchtitan, which does
it where a run names functions at the end of it:

    --override.imports flash_attn_ext.adapters.torchtitan.varlen flash_attn_ext.adapters.torchtitan.selective
"""

from dataclasses import dataclass

import torch
from torchtitan.config import derive, override
from torchtitan.distributed import activation_checkpoint
from torchtitan.models.common import attention as theirs
from torchtitan.protocols.module import Module

import flash_attn_ext

# torchtitan's names: B batch, L sequence, N heads, H head dim. Its sharding knows the arguments by them.


class VarlenAttention(theirs.VarlenAttention):
    """Of packed documents: causal, or in a window."""

    @dataclass(kw_only=True, slots=True)
    class Config(theirs.VarlenAttention.Config):
        pass

    def __init__(self, config):
        Module.__init__(self)  # their own wants the package of FlashAttention-3 on a Hopper GPU
        self.window_size = config.window_size

    def forward(
        self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks, scale=None, out_transform=None, enable_gqa=False
    ) -> torch.Tensor:
        """Arguments as of torchtitan's. out_transform: (out, lse) -> out, which may have a gradient through both."""
        packed = (_in_low_precision(x).flatten(0, 1) for x in (q_BLNH, k_BLNH, v_BLNH))
        out, lse = flash_attn_ext.flash_attn_varlen_func(
            *packed,
            attention_masks.cu_seq_q,
            attention_masks.cu_seq_k,
            softmax_scale=scale,
            causal=self.window_size[1] == 0,
            window_size=self.window_size,
            return_lse=True,
        )
        out = out.view_as(q_BLNH).to(q_BLNH.dtype)
        return out if out_transform is None else out_transform(out, lse.mT.unflatten(0, q_BLNH.shape[:2]))


class ScaledDotProductAttention(theirs.ScaledDotProductAttention):
    """Without documents: causal or not."""

    @dataclass(kw_only=True, slots=True)
    class Config(theirs.ScaledDotProductAttention.Config):
        pass

    def forward(
        self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks=None, scale=None, enable_gqa=False, is_causal=True
    ) -> torch.Tensor:
        """Arguments as of torchtitan's.

        Raises:
            ValueError: there is a mask; or is_causal and q and k differ in length, where torchtitan's mask is another.
        """
        if attention_masks is not None:
            raise ValueError("attention_masks must be None here: documents need torchtitan's VarlenAttention.")
        if is_causal and q_BLNH.shape[1] != k_BLNH.shape[1]:
            raise ValueError("is_causal needs as many queries as keys.")
        q, k, v = (_in_low_precision(x) for x in (q_BLNH, k_BLNH, v_BLNH))
        return flash_attn_ext.flash_attn_func(q, k, v, softmax_scale=scale, causal=is_causal).to(q_BLNH.dtype)


class SelectiveAC(activation_checkpoint.SelectiveAC):
    """Keeps the results of our operator as well, so that no backward computes them again."""

    @dataclass(kw_only=True, slots=True)
    class Config(activation_checkpoint.SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        return super().get_save_ops() | {torch.ops.flash_attn_ext.forward.default}


def _in_low_precision(x: torch.Tensor) -> torch.Tensor:
    """bf16 for float32 on a GPU, as torchtitan's VarlenAttention does it."""
    return x.to(torch.bfloat16) if x.is_cuda and x.dtype == torch.float32 else x


@override(target=theirs.VarlenAttention.Config, description="attention of packed documents by flash_attn_ext")
def varlen(config):
    return derive(config, VarlenAttention.Config)


@override(target=theirs.ScaledDotProductAttention.Config, description="attention by flash_attn_ext")
def dense(config):
    return derive(config, ScaledDotProductAttention.Config)


@override(target=activation_checkpoint.SelectiveAC.Config, description="keeps the results of flash_attn_ext")
def selective(config):
    return derive(config, SelectiveAC.Config)
