"""Loads the compiled module, or says why there is none."""

import importlib
import warnings
from types import ModuleType

import torch

try:
    # Written by setup.py beside the compiled module, so that versions can be compared before anything is loaded.
    from ._build_info import BUILD
except ImportError:
    BUILD = None

NOT_BUILT = "it was installed without its GPU kernels (torch had no CUDA then, or FLASH_ATTN_EXT_CUDA was 0)."
REBUILD = (
    "Install it again under this torch, from its sources: "
    "pip install --no-build-isolation --no-deps --force-reinstall ."  # with dependencies it would replace torch too
)


def _load() -> tuple[ModuleType | None, str | None]:
    """The module `_C` and None, or None and the reason."""
    built_for = BUILD["torch"] if BUILD else "an unknown version"
    running = torch.__version__
    if BUILD and built_for.split(".")[:2] != running.split(".")[:2]:
        return None, f"its GPU kernels were built for torch {built_for}, and this is torch {running}."
    try:
        return importlib.import_module("._C", __package__), None
    except ModuleNotFoundError:
        return None, NOT_BUILT
    except ImportError as error:
        return None, f"its GPU kernels, built for torch {built_for}, do not load under torch {running}: {error}."


_C, why_missing = _load()
if _C is None:
    if why_missing != NOT_BUILT:  # something is broken, and nobody has chosen it
        warnings.warn(f"flash_attn_ext runs on CPU tensors only: {why_missing} {REBUILD}", RuntimeWarning, stacklevel=2)
    why_missing = f"{why_missing} {REBUILD}"
