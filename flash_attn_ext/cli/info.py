"""What is installed here, and what of it runs.

Exit code: 0. For a script that needs the kernels: `selftest --device cuda`, or flash_attn_ext.is_available().
"""

import argparse
import json
import platform
import subprocess
from pathlib import Path

import torch

from .. import limits
from .._binary import BUILD, why_missing
from .._version import __version__
from . import show


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(options: argparse.Namespace) -> int:
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        show.facts(in_words(facts))
    return 0


def collect() -> dict:
    """Versions, the GPUs found and why one of them would not do, and the head dims that run."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
                "unavailable": limits.why_unavailable(index),
            }
        )
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "flash_attn_ext": __version__,
        "installed_in": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else None,
        "driver": driver_version(),
        "built_with": BUILD,
        "kernels_missing": why_missing,
        "unavailable": None if any(device["unavailable"] is None for device in devices) else limits.why_unavailable(),
        "devices": devices,
        "head_dims": {which: list(dims) for which, dims in limits.supported().items()},
    }


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def in_words(facts: dict) -> dict[str, str]:
    built = facts["built_with"]

    def state(unavailable: str | None, available: str) -> str:
        """Why there are no kernels is told once."""
        return "refused: no GPU kernels" if facts["kernels_missing"] else unavailable or available

    lines = {
        "flash_attn_ext": f"{facts['flash_attn_ext']}, in {facts['installed_in']}",
        "python": f"{facts['python']} on {facts['platform']}",
        "torch": f"{facts['torch']} (CUDA {facts['torch_cuda'] or 'none'}, cuDNN {facts['cudnn'] or 'none'})",
        "driver": facts["driver"] or "none found",
        "GPU kernels": facts["kernels_missing"] or "loaded",
        "built with": ", ".join(f"{name} {value}" for name, value in built.items()) if built else "unknown",
    }
    where = "on a Hopper GPU, were the kernels built: " if facts["kernels_missing"] else ""
    for which, dims in facts["head_dims"].items():
        lines[f"{which} head dims"] = where + limits.in_words(dims)
    for device in facts["devices"]:
        lines[device["device"]] = (
            f"{device['name']}, compute capability {device['compute_capability']}, {device['memory_gib']:g} GiB, "
            f"{device['multiprocessors']} multiprocessors: {state(device['unavailable'], 'available')}"
        )
    lines["CUDA tensors"] = state(facts["unavailable"], "run on the GPU kernels")
    lines["CPU tensors"] = "run in PyTorch"
    return lines
