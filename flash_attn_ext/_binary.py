"""Loads the compiled module, or says why there is none."""

import importlib
import platform
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

try:
    # Written by setup.py beside the compiled module, so that versions can be compared before anything is loaded.
    from ._build_info import BUILD
except ImportError:
    BUILD = None

FOLDER = Path(__file__).resolve().parent
IN_SOURCE_TREE = (FOLDER.parent / "csrc").is_dir()

NOT_BUILT = (
    f"this is the source tree, {FOLDER}, and its GPU kernels are not built."
    if IN_SOURCE_TREE
    else "it was installed without its GPU kernels (torch had no CUDA then, or FLASH_ATTN_EXT_CUDA was 0)."
)


def _load() -> tuple[ModuleType | None, str | None]:
    """The module `_C` and None, or None and the reason."""
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    for name, running in versions.items() if BUILD else ():
        built_for = BUILD[name.lower()]
        if built_for.split(".")[:2] != running.split(".")[:2]:
            return None, f"its GPU kernels were built for {name} {built_for}, and this is {name} {running}."
    try:
        return importlib.import_module("._C", __package__), None
    except ModuleNotFoundError:
        return None, NOT_BUILT
    except ImportError as error:
        built_for = BUILD["torch"] if BUILD else "an unknown version"
        running = versions["torch"]
        return None, f"its GPU kernels, built for torch {built_for}, do not load under torch {running}: {error}."


def _hidden_installation() -> Path | None:
    """The installed package that a source tree hides because it stands before it in sys.path: the next one there."""
    others = [entry for entry in sys.path if Path(entry).resolve() != FOLDER.parent]
    spec = PathFinder.find_spec(__package__, others) if IN_SOURCE_TREE else None
    return Path(spec.origin).parent if spec and spec.origin else None


def _way_out(hidden: Path | None) -> str:
    if not IN_SOURCE_TREE:
        return (
            "Install it again under this torch, from its sources: "
            # With dependencies it would replace torch too.
            "pip install --no-build-isolation --no-deps --force-reinstall ."
        )
    build = "build them in place: make build ENV=current"
    if not hidden:
        return f"To have them, {build}."
    leave = "leave this folder" if Path.cwd() == FOLDER.parent else f"take {FOLDER.parent} out of PYTHONPATH"
    return f"It hides the installed package, which is in {hidden}. To import that one, {leave}; or {build}."


_C, why_missing = _load()
if _C is None:
    hidden = _hidden_installation()
    chosen = why_missing == NOT_BUILT and not hidden  # else something is broken or in the way
    why_missing = f"{why_missing} {_way_out(hidden)}"
    if not chosen:
        warnings.warn(f"flash_attn_ext runs on CPU tensors only: {why_missing}", RuntimeWarning, stacklevel=2)
