"""The options of a call as one value: their types and defaults, and why a value is refused.

Inside the package they travel as `Options`. Only the public functions (interface.py) and the operators' schemas, which
are written from here, list them one by one. csrc/problem.h has them for the kernels, in the same order, and
csrc/torch/operators.h those that are tensors.
"""

import numbers
from typing import NamedTuple, get_type_hints

import torch

FLOAT32 = torch.finfo(torch.float32)  # what the kernels compute with
MOST_SCALE = FLOAT32.max * 0.6931471  # they multiply scores by scale * log2(e), which must not overflow
SCHEMA_TYPES = {float | None: "float?", bool: "bool", int: "int", float: "float", torch.Tensor | None: "Tensor?"}
UNBOUNDED = -1


class Options(NamedTuple):
    softmax_scale: float | None = None
    causal: bool = False
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    softcap: float = 0.0
    deterministic: bool = False
    sinks: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        sinks=None,
        deterministic=False,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
    ) -> "Options":
        """Of the arguments of a public function. What is no pair of sizes is left to `refusal`."""
        if type(window_size) is tuple and len(window_size) == 2:
            left, right = window_size
        elif window_size is None:
            left = right = UNBOUNDED
        else:
            left, right = window_size if type(window_size) is list and len(window_size) == 2 else (window_size, None)
        softcap = 0.0 if softcap is None else softcap
        tensors = sinks, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
        numbers = softmax_scale, causal, left, right, softcap, deterministic
        return tuple.__new__(cls, (*numbers, *tensors))  # half the time of cls(...)

    @property
    def window(self) -> tuple[int, int]:
        """How many keys a query sees left and right of its place on the diagonal; -1: all."""
        return self.window_left, 0 if self.causal else self.window_right

    def asked(self) -> dict[str, object]:
        """The options that only some kernels have, as far as they ask for something: values by the public names.
        Every kernel has `deterministic`."""
        asked = {}
        if self.window != (UNBOUNDED, 0 if self.causal else UNBOUNDED):
            asked["window_size"] = self.window_left, self.window_right
        if self.softcap != 0:
            asked["softcap"] = self.softcap
        given = {name.removesuffix("_q").removesuffix("_k"): tensor for name, tensor in self.tensors().items()}
        return asked | given

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those options that are tensors, as far as they are given."""
        return {name: self._asdict()[name] for name in TENSORS if self._asdict()[name] is not None}

    def differentiable(self) -> dict[str, torch.Tensor]:
        """Those of them that may require a gradient."""
        return {} if self.sinks is None else {"sinks": self.sinks}

    def without_tensors(self) -> "Options":
        return self._replace(**dict.fromkeys(TENSORS))

    def dense(self) -> "Options":
        """The options of a call for one of the sequences."""
        return self._replace(**dict.fromkeys(LENGTHS))

    def has_lengths(self) -> bool:
        return any(name in LENGTHS for name in self.tensors())

    def scale(self, head_dim: int) -> float:
        """The factor of the scores."""
        return head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def plain(self) -> "Options":
        """With numbers as the operators take them: NumPy's, too, become Python's."""
        scale, _, left, right, softcap, *_ = self
        return self._replace(
            softmax_scale=None if scale is None else _plain(scale, float),
            window_left=_plain(left, int),
            window_right=_plain(right, int),
            softcap=_plain(softcap, float),
        )

    def refusal(self) -> Exception | None:
        """What is wrong with a value, or None. All types come before any value."""
        return (
            _scale_type(self.softmax_scale)
            or _causal_type(self.causal)
            or _window_type(self.window_left, self.window_right)
            or _softcap_type(self.softcap)
            or _deterministic_type(self.deterministic)
            or self.plain()._value_refusal()
        )

    def _value_refusal(self) -> ValueError | None:
        return (
            _scale_value(self.softmax_scale)
            or _window_value(self.window_left, self.window_right)
            or _softcap_value(self.softcap)
        )


LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
TENSORS = ("sinks", *LENGTHS)


def lse_shape(q) -> tuple[int, ...]:
    """(batch, heads, seqlen_q), or (heads, total_q) of packed sequences."""
    *batch, rows, heads, _ = q.shape
    return *batch, heads, rows


def schema() -> str:
    """The options as arguments of an operator's schema."""
    types = get_type_hints(Options)
    return ", ".join(f"{SCHEMA_TYPES[types[name]]} {name}={Options._field_defaults[name]}" for name in Options._fields)


def _plain(number, kind: type):
    return number if isinstance(number, int | float | torch.SymInt | torch.SymFloat) else kind(number)


def _is_real(value) -> bool:
    return isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral | torch.SymInt) and not isinstance(value, bool)


def _scale_type(softmax_scale) -> TypeError | None:
    if softmax_scale is None or _is_real(softmax_scale):
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


def _window_type(left, right) -> TypeError | None:
    if _is_whole(left) and _is_whole(right):
        return None
    shown = f"{left!r:.60}" if right is None else f"({left!r:.60}, {right!r:.60})"
    return TypeError(
        f"window_size is {shown}; it must be two ints, (left, right): how many keys a query sees to either side of its "
        "place on the diagonal. -1 is unbounded."
    )


def _window_value(left, right) -> ValueError | None:
    if UNBOUNDED <= left < 2**63 and UNBOUNDED <= right < 2**63:
        return None
    return ValueError(
        f"window_size is {(left, right)}; each side must be a number of keys, at least 0 and below 2^63, or -1: "
        "unbounded."
    )


def _softcap_type(softcap) -> TypeError | None:
    if _is_real(softcap):
        return None
    return TypeError(
        f"softcap must be a float, not {type(softcap).__name__}. "
        "A tensor would have to be read back from the device: pass float(softcap)."
    )


def _deterministic_type(deterministic) -> TypeError | None:
    if isinstance(deterministic, bool):
        return None
    return TypeError(
        f"deterministic must be True or False, not {type(deterministic).__name__} ({deterministic!r:.60}). True makes "
        "the gradients the same in every run, bit for bit."
    )


def _softcap_value(softcap) -> ValueError | None:
    if softcap == 0 or FLOAT32.tiny <= softcap <= MOST_SCALE:  # NaN is out of the range as well
        return None
    return ValueError(
        f"softcap is {softcap}; it must be 0, which caps nothing, or finite and greater than 0, in float32's range "
        f"({FLOAT32.tiny:.3g} to {MOST_SCALE:.3g}). Scores become softcap * tanh(score / softcap)."
    )
