"""python -m flash_attn_ext info [--json]: what is installed here, and what of it runs."""

import argparse
import json
import platform

import torch

from . import limits
from ._binary import BUILD, why_missing
from ._version import __version__


def info() -> dict:
    """Versions, the GPUs found and why one of them would not do, and the head dimensions that run."""
    devices = [
        {
            "device": f"cuda:{index}",
            "name": torch.cuda.get_device_name(index),
            "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
            "unavailable": limits.why_unavailable(index),
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "flash_attn_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "built_with": BUILD,
        "unavailable": None if any(device["unavailable"] is None for device in devices) else limits.why_unavailable(),
        "devices": devices,
        "head_dims": limits.supported(),
    }


def print_info(facts: dict) -> None:
    built = facts["built_with"]
    rows = {
        "flash_attn_ext": facts["flash_attn_ext"],
        "python": facts["python"],
        "torch": f"{facts['torch']} (CUDA {facts['torch_cuda'] or 'none'})",
        "GPU kernels": why_missing or "loaded",
        "built with": ", ".join(f"{name} {value}" for name, value in built.items()) if built else "unknown",
    }
    for which, dims in facts["head_dims"].items():
        rows[f"{which} head dims"] = ", ".join(map(str, dims)) or "none"
    for device in facts["devices"]:
        state = device["unavailable"] or "available"
        rows[device["device"]] = f"{device['name']}, compute capability {device['compute_capability']}: {state}"
    rows["CUDA tensors"] = facts["unavailable"] or "run on the GPU kernels"
    rows["CPU tensors"] = "run on the PyTorch reference"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flash_attn_ext", description="Exact attention for Hopper GPUs.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="what is installed here, and what of it runs")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args()
    facts = info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print_info(facts)


if __name__ == "__main__":
    main()
