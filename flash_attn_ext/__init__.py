"""Exact attention for Hopper GPUs."""

from ._version import __version__
from .interface import (
    attention_reference,
    attention_reference_backward,
    backward,
    explain,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    forward,
    sdpa,
)
from .limits import is_available, supported

__all__ = [
    "__version__",
    "attention_reference",
    "attention_reference_backward",
    "backward",
    "explain",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "forward",
    "is_available",
    "sdpa",
    "supported",
]
