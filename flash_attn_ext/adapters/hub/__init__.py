"""The kernel that Hugging Face's package kernels loads from this folder, in place of FlashAttention-3's from its Hub.

`python -m flash_attn_ext.adapters.hub` prints what the environment variable LOCAL_KERNELS must be for that. The package
kernels reads metadata.json, and runs this file under another name than its own, so that no import here is relative.
"""

from flash_attn_ext.adapters import flash_attn_interface  # noqa: F401
from flash_attn_ext.adapters.flash_attn_interface import *  # noqa: F403
