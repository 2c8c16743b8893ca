"""The table of csrc/limits.h, wherever the package is installed."""

from .. import limits


class NoTable(Exception):
    """This copy of the package was never installed or built."""


def rows() -> list[dict]:
    if not limits.TABLE:
        raise NoTable(
            "this copy of flash_attn_ext has no table of head dims, because it was never installed: "
            "pip install --no-build-isolation ., or make build in the checkout"
        )
    return limits.TABLE


def head_dims() -> dict[str, list[int]]:
    """Head dims that run ("forward") and that train ("backward") on a Hopper GPU with the kernels built."""
    rows()
    return {which: list(dims) for which, dims in limits.supported().items()}
