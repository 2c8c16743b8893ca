"""torch.nn.functional.scaled_dot_product_attention (SDPA) and torch.nn.attention.varlen.varlen_attn on the kernels of
this package, where they take the call, as a flash attention implementation of torch's registry.

Importing this module registers the name and nothing else. Activated, csrc/torch/sdpa.cpp stands in front of torch's
flash operators and of its cuDNN operator as well: on Hopper torch prefers cuDNN. An order of backends that has flash
first would do too, but it is another setting to restore, the calls that are not taken would go elsewhere than before,
and a graph that torch.compile traced earlier would keep its cuDNN.
"""

import threading
from contextlib import contextmanager

from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)

from flash_attn_ext._binary import _C, why_missing

NAME = "flash_attn_ext"


def _activate():
    if _C is None:
        raise RuntimeError(f"{NAME} cannot be activated: {why_missing}")
    return _C.SdpaOverride()


register_flash_attention_impl(NAME, register_fn=_activate)


# The setting is the process's, and contexts of several threads may overlap: the first one finds what was active before,
# and the last one brings it back.
_lock = threading.Lock()
_contexts = 0
_before = None


@contextmanager
def activated():
    """What `flash_attn_ext.sdpa` returns."""
    global _contexts, _before
    with _lock:
        if _contexts == 0:
            _before = current_flash_attention_impl()
        _contexts += 1
    try:
        with _lock:
            _set(NAME)
        yield
    finally:
        with _lock:
            _contexts -= 1
            _set(NAME if _contexts else _before)


def _set(wanted):
    now = current_flash_attention_impl()
    if wanted is None and now is not None:
        restore_flash_attention_impl()
    elif now != wanted:
        activate_flash_attention_impl(wanted)
