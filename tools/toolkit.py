"""Finds the CUDA toolkit by what a build needs of it: nvcc, cuda_runtime.h and libcudart.

The directory above the nvcc on PATH is a guess that fails with wrapper scripts and distributions' packages, so every
candidate is looked into. `python tools/toolkit.py` prints the directory of the toolkit that fits the installed torch.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OLDEST = (12, 8)


@dataclass(frozen=True)
class Toolkit:
    home: Path
    nvcc: Path
    cudart: Path  # the shared library, which may have no development symlink
    version: tuple[int, int]


def find(torch_cuda: str) -> Toolkit:
    """The first complete toolkit of the major version of torch's CUDA; FileNotFoundError with the places looked at if
    there is none."""
    major = int(torch_cuda.split(".")[0])
    looked_at = []
    for home in dict.fromkeys(_candidates()):
        toolkit = _inspect(home, major)
        if isinstance(toolkit, Toolkit):
            return toolkit
        looked_at.append(f"  {home}: {toolkit}")
    # PyPI's packages for CUDA 12 have no nvcc.
    packages = f"; or install one from PyPI: pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]=={torch_cuda}.*'"
    raise FileNotFoundError(
        f"no CUDA toolkit for torch's CUDA {torch_cuda}, at least {'.'.join(map(str, OLDEST))}, found. Looked at:\n"
        + "\n".join(looked_at)
        + f"\nSet CUDA_HOME{packages if major >= 13 else ''}"
        + "; or install for CPU tensors only: FLASH_ATTN_EXT_CUDA=0 pip install ."
    )


def _candidates():
    """Directories that may hold a toolkit, the likeliest first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    if nvcc := shutil.which("nvcc"):
        # What nvcc itself calls its top sees through wrapper scripts; symbolic links are followed after that.
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE):
            yield Path(top[1].strip()).resolve()
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    # PyPI's packages share one directory per major version.
    yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*"), reverse=True)


def _inspect(home: Path, major: int) -> Toolkit | str:
    """The toolkit in this directory, or what is wrong with it."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return "no bin/nvcc"
    if not (home / "include" / "cuda_runtime.h").exists():
        return "no include/cuda_runtime.h"
    says = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", says)
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if version < OLDEST:
        return f"nvcc {version[0]}.{version[1]} is too old"
    if version[0] != major:
        return f"nvcc {version[0]}.{version[1]} is of another major version than torch's CUDA"
    for folder in ("lib64", "lib", f"targets/{os.uname().machine}-linux/lib"):
        for cudart in sorted((home / folder).glob("libcudart.so*")):
            return Toolkit(home, nvcc, cudart, version)
    return "no libcudart.so"


if __name__ == "__main__":
    import torch

    try:
        print(find(torch.version.cuda or "13.0").home)
    except FileNotFoundError as error:
        sys.exit(str(error))
