"""torch.nn.functional.scaled_dot_product_attention (SDPA) and torch.nn.attention.varlen.varlen_attn on the kernels of
this package, where they take the call, as a flash attention implementation of torch's registry.

Importing this module registers the name and nothing else. Activated, csrc/torch/sdpa.cpp stands in front of torch's
flash operators and of its cuDNN operator as well: on Hopper torch prefers cuDNN. An order of backends that has flash
first would do too, but it is another setting to restore, the calls that are not taken would go elsewhere than before,
and a graph that torch.compile traced earlier would keep its cuDNN.
"""

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


@contextmanager
def activated():
    """What `flash_attn_ext.sdpa` returns."""
    before = current_flash_attention_impl()
    try:
        if before != NAME:
            activate_flash_attention_impl(NAME)
        yield
    finally:
        now = current_flash_attention_impl()
        if before is None and now is not None:
            restore_flash_attention_impl()
        elif now != before:
            activate_flash_attention_impl(before)
