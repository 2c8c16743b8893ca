"""Builds flash_attn_ext: `pip install --no-build-isolation .`, or `python setup.py bdist_wheel`.

Environment:
    CUDA_HOME                 the CUDA toolkit, where tools/toolkit.py does not find the right one
    MAX_JOBS                  compilers at a time; default: what cores and memory allow
    FLASH_ATTN_EXT_CUDA=0     no GPU kernels: the package runs on CPU tensors only. So it is where torch has no CUDA
    FLASH_ATTN_EXT_STRICT=1   a kernel that spills, uses a stack frame or has its wgmma serialised fails the build
"""

import os
import pprint
import shlex
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))  # build front ends do not put this directory on the path
import limits_table  # noqa: E402

# -O1 is for the host's code alone, which is next to nothing beside the kernels, and compiles faster.
CXX_FLAGS = ["-std=c++20", "-O1", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
NVCC_FLAGS = [
    "-std=c++20",
    "-O1",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--ptxas-options=-v",  # tools/nvcc.py reads it
    "-Xcompiler=-fvisibility=hidden",
    # torch's build helper forbids these operators; the CMake build does not, and both compile the same kernels.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
]

# What compiles longest starts first, so that few cores end at about the same time.
LONGEST = ("csrc/torch/operators.cpp", "csrc/backward.cu")


def base_version() -> str:
    scope: dict = {}
    exec((ROOT / "flash_attn_ext" / "_version.py").read_text(), scope)
    return scope["__version__"]


def default_jobs() -> int:
    """One compiler a core, and 4 GB for each: a kernel file takes up to 3."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**32))


def without_binary() -> dict:
    return {"version": base_version()}


def with_binary() -> dict:
    import toolkit

    cuda = toolkit.find(torch.version.cuda)
    # torch's helper reads these when it is imported or used, and guesses the toolkit from nvcc's path otherwise.
    os.environ["CUDA_HOME"] = str(cuda.home)
    os.environ["PYTORCH_NVCC"] = shlex.join([sys.executable, str(ROOT / "tools" / "nvcc.py"), str(cuda.nvcc)])
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    sources = [f"csrc/torch/{path.name}" for path in sorted((ROOT / "csrc" / "torch").glob("*.cpp"))]
    sources += [f"csrc/{kernel}" for kernel in (ROOT / "csrc" / "kernels.txt").read_text().split()]
    # setuptools starts no build at all unless one of these is newer than the module.
    depends = ["setup.py", "tools/nvcc.py", *(str(path) for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    extension = CUDAExtension(
        "flash_attn_ext._C",
        sources,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        # By its path: PyPI's toolkit has no libcudart.so to find with -lcudart.
        extra_link_args=[str(cuda.cudart), "-Wl,--as-needed", "-s"],
        depends=depends,
    )
    extension.libraries.remove("cudart")
    build = {
        "torch": torch.__version__.split("+")[0],
        "cuda": ".".join(map(str, cuda.version)),
        "python": ".".join(map(str, sys.version_info[:3])),
        "arch": "sm_90a",
    }

    class Build(BuildExtension):
        def swig_sources(self, sources: list[str], extension) -> list[str]:
            # The one hook behind setuptools' sorting.
            return sorted(super().swig_sources(sources, extension), key=lambda path: path not in LONGEST)

        def run(self) -> None:
            super().run()
            # What flash_attn_ext/_binary.py compares before it loads the module.
            folder = Path(self.get_ext_fullpath("flash_attn_ext._C")).parent
            (folder / "_build_info.py").write_text(f"BUILD = {pprint.pformat(build, sort_dicts=False)}\n")

    torch_tag = ".".join(build["torch"].split(".")[:2])
    return {
        "version": f"{base_version()}+cu{build['cuda'].replace('.', '')}torch{torch_tag}",
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
    }


limits_table.write()  # before setup() looks for modules; installations with and without kernels have it
switched_off = os.environ.get("FLASH_ATTN_EXT_CUDA") == "0"
only_sources = "sdist" in sys.argv  # they are the same for every torch and toolkit, and so is their version
setup(**(without_binary() if switched_off or only_sources or torch.version.cuda is None else with_binary()))
