"""Builds flash_attn_ext: `pip install --no-build-isolation .`, or `python setup.py bdist_wheel`.

The compiled module runs under the torch that it was built with, so a build takes the one that is installed, and the
package then requires its minor version. torch is no build requirement: pip would fetch the newest one for the build.

Environment:
    CUDA_HOME                 the CUDA toolkit, where tools/toolkit.py does not find the right one
    MAX_JOBS                  compilers at a time; default: what cores and memory allow
    FLASH_ATTN_EXT_CUDA=0     no GPU kernels: the package runs on CPU tensors only. So it is where torch has no CUDA
    FLASH_ATTN_EXT_STRICT=1   a kernel that spills, uses a stack frame or has its wgmma serialised fails the build
"""

import importlib.util
import os
import pprint
import shlex
import sys
from pathlib import Path

import setuptools

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

OLDEST_TORCH = "2.11"
BUILD_TOOLS = 'ninja "setuptools>=70.1"'
NO_TORCH = f"""
There is no torch here to build the GPU kernels with. They must be built with the one that they will run under, and pip
hides it from the build (build isolation) unless told not to. In the environment that is to have flash_attn_ext:

    pip install torch {BUILD_TOOLS}
    pip install --no-build-isolation .

Without GPU kernels, for CPU tensors only: FLASH_ATTN_EXT_CUDA=0 pip install .
"""

# What compiles longest starts first, so that few cores end at about the same time.
LONGEST = ("csrc/torch/operators.cpp", "csrc/backward.cu", "csrc/forward.cu")


def base_version() -> str:
    scope: dict = {}
    exec((ROOT / "flash_attn_ext" / "_version.py").read_text(), scope)
    return scope["__version__"]


def default_jobs() -> int:
    """One compiler a core, and 4 GB for each: a kernel file takes up to 3."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**32))


def torch_to_build_with():
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit(NO_TORCH)
    if torch.__version__ < OLDEST_TORCH:  # a TorchVersion, which compares as versions do
        sys.exit(f"torch {torch.__version__} is installed; flash_attn_ext needs at least {OLDEST_TORCH}.")
    return torch


def without_binary() -> dict:
    return {"version": base_version(), "install_requires": [f"torch>={OLDEST_TORCH}"]}


def with_binary(torch) -> dict:
    import toolkit

    try:
        cuda = toolkit.find(torch.version.cuda)
    except FileNotFoundError as error:
        sys.exit(str(error))
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
        "install_requires": [f"torch=={torch_tag}.*"],
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
    }


def arguments() -> dict:
    """Those of setup() that pyproject.toml does not know."""
    # Sources, and what they need to be built, are the same for every torch and toolkit, and so is their version.
    only_sources = not {"sdist", "egg_info"}.isdisjoint(sys.argv)
    if only_sources or os.environ.get("FLASH_ATTN_EXT_CUDA") == "0":
        return without_binary()
    torch = torch_to_build_with()
    return with_binary(torch) if torch.version.cuda else without_binary()


if "bdist_wheel" in sys.argv and not importlib.util.find_spec("setuptools.command.bdist_wheel"):
    sys.exit(f"setuptools {setuptools.__version__} is too old to build a wheel by itself: pip install {BUILD_TOOLS}")
limits_table.write()  # before setup() looks for modules; installations with and without kernels have it
setuptools.setup(**arguments())
