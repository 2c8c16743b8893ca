"""The options of a call as one value: their types and defaults, and why a value is refused.

Inside the package they travel as `Options`. Only the public functions (interface.py) and the operators' schemas, which
are written from here, list them one by one. csrc/problem.h has them for the kernels, in the same order.
"""

import numbers
from typing import NamedTuple, get_type_hints

import torch

FLOAT32 = torch.finfo(torch.float32)  # what the kernels compute with
MOST_SCALE = FLOAT32.max * 0.6931471  # they multiply scores by scale * log2(e), which must not overflow
SCHEMA_TYPES = {float | None: "float?", bool: "bool"}


class Options(NamedTuple):
    softmax_scale: float | None = None
    causal: bool = False

    def scale(self, head_dim: int) -> float:
        """The factor of the scores."""
        return head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def plain(self) -> "Options":
        """With numbers as the operators take them: NumPy's, too, become Python's."""
        if self.softmax_scale is None or isinstance(self.softmax_scale, int | float | torch.SymInt | torch.SymFloat):
            return self
        return self._replace(softmax_scale=float(self.softmax_scale))

    def refusal(self) -> Exception | None:
        """What is wrong with a value, or None. All types come before any value."""
        return _scale_type(self.softmax_scale) or _causal_type(self.causal) or _scale_value(self.plain().softmax_scale)


def schema() -> str:
    """The options as arguments of an operator's schema."""
    types = get_type_hints(Options)
    return ", ".join(f"{SCHEMA_TYPES[types[name]]} {name}={Options._field_defaults[name]}" for name in Options._fields)


def _scale_type(softmax_scale) -> TypeError | None:
    accepted = numbers.Real | torch.SymInt | torch.SymFloat
    if softmax_scale is None or (isinstance(softmax_scale, accepted) and not isinstance(softmax_scale, bool)):
        return None
    return TypeError(
        f"softmax_scale must be a float or None, not {type(softmax_scale).__name__}. "
        "A tensor would have to be read back from the device: pass float(scale)."
    )


def _causal_type(causal) -> TypeError | None:
    if isinstance(causal, bool):
        return None
    return TypeError(
        f"causal must be True or False, not {type(causal).__name__} ({causal!r:.60}). By position it is the fifth "
        "argument, after softmax_scale; FlashAttention-2 has dropout_p before both."
    )


def _scale_value(softmax_scale) -> ValueError | None:
    if softmax_scale is None or FLOAT32.tiny <= softmax_scale <= MOST_SCALE:  # NaN is out of the range as well
        return None
    return ValueError(
        f"softmax_scale is {softmax_scale}; it must be finite and greater than 0, in float32's range "
        f"({FLOAT32.tiny:.3g} to {MOST_SCALE:.3g}; default: 1/sqrt(head_dim)). By position it is the fourth argument, "
        "where FlashAttention-2 has dropout_p: pass softmax_scale and causal by name."
    )
