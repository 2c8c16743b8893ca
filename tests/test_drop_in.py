"""FlashAttention-3's names outside of this package: the wheel of tools/shim, and the folder that Hugging Face's package
kernels loads. Programs run in a process of their own, and find both as a user's would.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import on_hopper
from test_documents import TORCH_ABORTS, program

import flash_attn_ext
from flash_attn_ext.adapters import flash_attn_interface

ROOT = Path(__file__).parents[1]
PACKAGE = Path(flash_attn_ext.__file__).parent

each = pytest.mark.parametrize


def run(*arguments, path=(), device="cpu", torch_may_abort=False, **environment):
    """Standard output of a Python process that finds flash_attn_ext and, before it, the folders of path.

    torch_may_abort: as in test_documents.py.
    """
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    folders = [*map(str, path), str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1", **hidden}
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    aborted = torch_may_abort and TORCH_ABORTS in done.stderr
    assert done.returncode == 0 or aborted, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """A folder in which the wheel is installed. It is built as `make shim` builds it."""
    folder = tmp_path_factory.mktemp("shim")
    shutil.copytree(ROOT / "tools" / "shim", folder / "source")
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == "flash_attn_3-3.0.0+flash.attn.ext-py3-none-any.whl"
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", folder / "installed", wheel)
    return folder / "installed"


# The wheel ------------------------------------------------------------------------------------------------------------


def test_the_modules_are_ours(shim):
    program = """
import flash_attn_3, flash_attn_interface
from flash_attn_3 import flash_attn_interface as packaged
from flash_attn_ext.adapters import flash_attn_interface as ours
print(flash_attn_3.__version__)
for module in (flash_attn_interface, packaged):
    print(module.__file__)
    print(all(getattr(module, name) is getattr(ours, name) for name in ours.__all__))
"""
    version, *lines = run("-c", program, path=[shim]).splitlines()
    assert version == "3.0.0+flash.attn.ext"
    files = [str(shim / "flash_attn_interface.py"), str(shim / "flash_attn_3" / "flash_attn_interface.py")]
    assert lines == [files[0], "True", files[1], "True"]


def test_importers_find_the_distribution(shim):
    """By its name, as TransformerEngine asks, and by its modules, as transformers asks. No index takes it."""
    program = """
from importlib import metadata
print(metadata.version("flash-attn-3"), *metadata.requires("flash-attn-3"))
print(*(metadata.packages_distributions()[name] for name in ("flash_attn_interface", "flash_attn_3")))
print(metadata.metadata("flash-attn-3").get_all("Classifier"))
"""
    assert run("-c", program, path=[shim]).splitlines() == [
        "3.0.0+flash.attn.ext flash_attn_ext",
        "['flash_attn_3'] ['flash_attn_3']",
        "['Private :: Do Not Upload']",
    ]


def test_the_program_of_the_documents_with_the_wheel(shim, tmp_path):
    (tmp_path / "its_distribution.py").write_text(program("its_distribution.py"))
    assert run(tmp_path / "its_distribution.py", path=[shim]) == "3.0.0+flash.attn.ext True\n"


def test_every_public_name_is_in_the_list():
    """The wheel and the folder export the list."""
    module = flash_attn_interface.__name__
    functions = {name for name, x in vars(flash_attn_interface).items() if getattr(x, "__module__", None) == module}
    pair = {"_flash_attn_forward", "_flash_attn_backward"}
    assert {name for name in functions if not name.startswith("_")} | pair == set(flash_attn_interface.__all__)


# The folder that the package kernels loads ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_kernels():
    """The value of LOCAL_KERNELS."""
    return run("-m", "flash_attn_ext.adapters.hub").strip()


def test_the_command_names_a_kernel(local_kernels):
    """Whatever is installed."""
    kernels = dict(entry.split("=") for entry in local_kernels.split(":"))
    assert list(kernels) == ["kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3"]
    for folder in map(Path, kernels.values()):
        assert (folder / "__init__.py").is_file()
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["name"] == "flash-attn3" and metadata["backend"] == {"type": "cuda", "archs": ["9.0a"]}


def test_get_kernel(local_kernels):
    pytest.importorskip("kernels", minversion="0.17", reason="Hugging Face's package kernels is not installed")
    program = """
from kernels import get_kernel, has_kernel
from flash_attn_ext.adapters import flash_attn_interface as ours
for name in ("kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3"):
    kernel = get_kernel(name, version=1)
    print(has_kernel(name, version=1), kernel.flash_attn_interface is ours)
    print(all(getattr(kernel, name) is getattr(ours, name) for name in ours.__all__))
"""
    assert run("-c", program, LOCAL_KERNELS=local_kernels) == "True True\nTrue\n" * 2


def test_the_program_of_the_documents_with_the_folder(local_kernels, tmp_path):
    pytest.importorskip("kernels", minversion="0.17", reason="Hugging Face's package kernels is not installed")
    (tmp_path / "its_kernel.py").write_text(program("its_kernel.py"))
    printed = run(tmp_path / "its_kernel.py", LOCAL_KERNELS=local_kernels)
    assert printed == f"torch.Size([2, 512, 8, 64]) {flash_attn_interface.__name__}\n"


# transformers ---------------------------------------------------------------------------------------------------------

# On a CPU transformers would look at neither: it asks for a GPU, and 5.24 for kernels 0.18.2 where 0.17.2 is what these
# tests were written with. Both questions are answered here; all else is transformers' own way to its functions.
MODEL = """
import copy, sys
import torch
import transformers.utils
from transformers.utils import import_utils

implementation, family, device, *kinds = sys.argv[1:]
if device == "cpu":
    import_utils.is_torch_cuda_available = lambda: True
if "/" in implementation and not import_utils.is_kernels_available():
    transformers.utils.is_kernels_available = import_utils.is_kernels_available = lambda *_: True

from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 32}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
more = {}
if family == "gpt_oss":  # with all experts for every token: none is chosen by a rounding
    more = {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 5}
config = AutoConfig.for_model(family, **sizes, **heads, **more)
torch.manual_seed(0)
exact = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
for name, x in exact.named_parameters():
    if "sinks" in name:
        torch.nn.init.normal_(x)
ours = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
ours.load_state_dict(exact.state_dict())
exact, ours = exact.to(device), ours.to(device)
eager = copy.deepcopy(exact)
if device == "cuda":
    eager, ours = eager.bfloat16(), ours.bfloat16()


def inputs(kind):
    ids = torch.randint(1, 96, (1 if kind == "packed" else 2, 24), device=device)
    arguments = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if kind == "padded":
        arguments["attention_mask"] = torch.ones_like(ids)
        arguments["attention_mask"][1, :7] = 0
        arguments["labels"][1, :8] = -100  # the first token is predicted from padding
    if kind == "packed":
        arguments["position_ids"] = torch.cat([torch.arange(9), torch.arange(15)])[None].to(device)
    return arguments


for arguments in map(inputs, kinds):
    gradients = []
    for model in (exact, eager, ours):
        model.zero_grad()
        model(**arguments).loss.backward()
        gradients.append({name: x.grad.float() for name, x in model.named_parameters()})
    relative_errors = torch.zeros(2)
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 2e-3, name
        if device == "cpu":
            torch.testing.assert_close(gradients[2][name], expected, rtol=1e-4, atol=1e-4)  # as in test_transformers.py
        relative_errors += torch.tensor([(x[name] - expected).norm() / expected.norm() for x in gradients[1:]])
    if device == "cuda":
        assert relative_errors[1] <= 2 * relative_errors[0], relative_errors
print(ours.config._attn_implementation)
for function in (modeling_flash_attention_utils._flash_fn, modeling_flash_attention_utils._flash_varlen_fn):
    print(function.__module__, function.__name__)
"""


def check_model(implementation, family, *kinds, device="cpu", **options):
    """Gradients of a model against those with eager attention, for each kind of inputs; what transformers called was
    ours. On a GPU in bf16: the sum of their relative errors may be twice that of eager attention's, against float32."""
    pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 is not installed")
    functions = [f"{flash_attn_interface.__name__} {name}" for name in ("flash_attn_func", "flash_attn_varlen_func")]
    lines = run("-c", MODEL, implementation, family, device, *kinds, device=device, **options).splitlines()
    assert lines == [implementation, *functions]


def check_model_of_the_folder(family, name, local_kernels, **options):
    pytest.importorskip("kernels", minversion="0.17", reason="Hugging Face's package kernels is not installed")
    check_model(f"kernels-community/{name}", family, "plain", "padded", LOCAL_KERNELS=local_kernels, **options)


# gpt-oss has sinks, and asks for the second name.
each_family = each("family, name", [("llama", "flash-attn3"), ("gpt_oss", "vllm-flash-attn3")])


def test_transformers_with_the_wheel(shim):
    check_model("flash_attention_3", "llama", "plain", "padded", "packed", path=[shim])


@each_family
def test_transformers_with_the_folder(family, name, local_kernels):
    check_model_of_the_folder(family, name, local_kernels)


# diffusers ------------------------------------------------------------------------------------------------------------

PARALLEL = """
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY, attention_backend, dispatch_attention_fn

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
q, k, v, dout = (torch.randn(2, 16, 4, 32) for _ in range(4))


def results(*inputs, dout, config=None):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = dispatch_attention_fn(*inputs, parallel_config=config)
    return out, *torch.autograd.grad(out, inputs, dout)


for backend in ("_flash_3_hub", "_flash_3_varlen_hub"):
    expected = results(q, k, v, dout=dout)  # torch's SDPA
    with attention_backend(backend):
        for x, of_sdpa in zip(results(q, k, v, dout=dout), expected, strict=True):
            torch.testing.assert_close(x, of_sdpa)
        for degree in ("ring_degree", "ulysses_degree"):
            config = ContextParallelConfig(**{degree: 2})
            mesh = dist.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
            parallel = ParallelConfig(context_parallel_config=config)
            parallel.setup(rank, 2, torch.device("cpu"), mesh=mesh)
            parts = [x.chunk(2, 1)[rank] for x in (q, k, v, dout)]
            for x, whole in zip(results(*parts[:3], dout=parts[3], config=parallel), expected, strict=True):
                torch.testing.assert_close(x, whole.chunk(2, 1)[rank])
for kernel in _HUB_KERNELS_REGISTRY.values():
    if kernel.kernel_fn is not None:
        assert kernel.kernel_fn.__module__ == kernel.wrapped_backward_fn.__module__, kernel
        print(f"{kernel.kernel_fn.__module__} {kernel.kernel_fn.__name__}", flush=True)
dist.destroy_process_group()
"""


def test_diffusers_with_the_folder(local_kernels, tmp_path):
    """Its own functions: for one process, a ring of two and Ulysses on two. The ring calls the pair."""
    pytest.importorskip("kernels", minversion="0.17", reason="Hugging Face's package kernels is not installed")
    pytest.importorskip("diffusers", minversion="0.42", reason="diffusers 0.42 is not installed")
    (tmp_path / "parallel.py").write_text(PARALLEL)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {"LOCAL_KERNELS": local_kernels, "OMP_NUM_THREADS": "1"}
    printed = run(*launcher, tmp_path / "parallel.py", torch_may_abort=True, **environment)
    module = flash_attn_interface.__name__
    assert sorted(printed.splitlines()) == [f"{module} flash_attn_func"] * 2 + [f"{module} flash_attn_varlen_func"] * 2


# On a GPU -------------------------------------------------------------------------------------------------------------


@on_hopper
def test_transformers_with_the_wheel_on_a_gpu(shim):
    check_model("flash_attention_3", "llama", "plain", "padded", "packed", path=[shim], device="cuda")


@on_hopper
@each_family
def test_transformers_with_the_folder_on_a_gpu(family, name, local_kernels):
    check_model_of_the_folder(family, name, local_kernels, device="cuda")
