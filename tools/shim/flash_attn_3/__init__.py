"""flash_attn_ext under the name of FlashAttention-3's package, whose version importers ask for."""

from importlib.metadata import version

__version__ = version("flash_attn_3")
