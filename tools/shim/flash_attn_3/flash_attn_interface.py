"""flash_attn_ext under the name of FlashAttention-3's module."""

from flash_attn_ext.adapters.flash_attn_interface import *  # noqa: F403
