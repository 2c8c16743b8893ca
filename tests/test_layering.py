"""The house of csrc/: who may include whom, where torch and asm may be, and that builds compile every kernel. And that
the package's adapters stand outside of it.
"""

import ast
import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
PACKAGE = Path(__file__).parents[1] / "flash_attn_ext"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"})

DESCRIPTION = {"limits.h", "problem.h"}
INTERFACE = DESCRIPTION | {"launch.h"}
OF_KERNELS = INTERFACE | {"work.h", "device.h", "tensor_map.h", "ptx", "tile"}
SEQUENCES = {"tile/sequences.h", "tile/sequence.h", "tile/host_device.h"}
ORDER = {"tile/schedule.h"}
# A layer, and the layers or files of ours that it may include besides its own.
MAY_INCLUDE = {
    "limits.h": set(),
    "problem.h": SEQUENCES,
    "work.h": DESCRIPTION | ORDER,
    "launch.h": DESCRIPTION,
    "torch": INTERFACE,
    "ptx": set(),
    "tile": {"ptx"},
    "device.h": {"launch.h"},
    "tensor_map.h": INTERFACE | {"device.h", "tile"},
    "forward": OF_KERNELS,
    "backward": OF_KERNELS,
}
STANDARD_LIBRARY_ONLY = sorted(DESCRIPTION | SEQUENCES | ORDER | {"work.h"})
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))


def code(path):
    """The file without comments and strings' contents; include lines keep their paths."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r'(#include\s+"[^"\n]*")|"(?:\\.|[^"\\\n])*"', lambda found: found[1] or '""', text)


def layer(path):
    """The directory's name, or the file's; forward.cu, forward_tile.cuh, ... are one layer."""
    first, *rest = path.relative_to(CSRC).parts
    if rest:
        return first
    return next((name for name in ("forward", "backward") if re.match(rf"{name}\b|{name}_", first)), first)


def includes(path, brackets):
    pattern = r'#include\s+"([^"]+)"' if brackets == '""' else r"#include\s+<([^>]+)>"
    return re.findall(pattern, code(path))


def resolve(path, include):
    found = [base / include for base in (path.parent, CSRC) if (base / include).exists()]
    assert found, f"{path.name} includes {include}, which is not in csrc/"
    return found[0].resolve()


def test_every_file_has_a_layer():
    assert FILES
    assert {layer(path) for path in FILES} - MAY_INCLUDE.keys() == set()


@each_file
def test_includes_run_one_way(path):
    allowed = MAY_INCLUDE[layer(path)] | {layer(path)}

    def is_allowed(include):
        file = resolve(path, include)
        return not allowed.isdisjoint({layer(file), str(file.relative_to(CSRC))})

    forbidden = [include for include in includes(path, '""') if not is_allowed(include)]
    assert forbidden == [], f"{path.name} may include {sorted(allowed)}"


@each_file
def test_only_the_folder_torch_sees_torch(path):
    theirs = [x for x in includes(path, "<>") if re.match(r"(torch|ATen|c10|pybind11)/|Python\.h", x)]
    if layer(path) == "torch":
        assert "torch/extension.h" not in theirs, "it takes half a minute to compile; the small headers do"
    else:
        assert theirs == [] and not re.search(r"\b(at|c10|torch|pybind11)::", code(path))


@each_file
def test_asm_is_in_ptx_only(path):
    assert layer(path) == "ptx" or not re.search(r"\b(asm|__asm__)\b", code(path))


@each_file
def test_tile_knows_no_calls(path):
    if layer(path) in ("tile", "ptx"):
        assert not re.search(r"\b(Forward|Backward)Params\b|\bProblem\b|\bkLimits\b", code(path))


@each_file
def test_no_macros(path):
    """But one, which its comment defends."""
    macros = re.findall(r"#define\s+(\w+)", code(path))
    assert set(macros) <= ({"HOST_DEVICE"} if path.name == "host_device.h" else set())
    if path.suffix in {".h", ".cuh"}:
        assert "#pragma once" in path.read_text()


@pytest.mark.parametrize("name", STANDARD_LIBRARY_ONLY)
def test_what_host_tests_include_needs_the_standard_library_only(name):
    assert [x for x in includes(CSRC / name, "<>") if not re.fullmatch(r"\w+", x)] == []


def test_builds_compile_every_kernel():
    """One source list serves setup.py and CMakeLists.txt."""
    assert sorted((CSRC / "kernels.txt").read_text().split()) == sorted(path.name for path in CSRC.glob("*.cu"))
    for build in ("setup.py", "CMakeLists.txt"):
        assert "kernels.txt" in (CSRC.parent / build).read_text(), f"{build} does not read the list"


def imported(path):
    """The modules that a file of the package imports, and their names that it takes, with dots."""
    inside = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) + 1 - node.level] if node.level else ()
            yield from (".".join((*base, *filter(None, [node.module]), name.name)) for name in node.names)


def test_adapters_see_public_functions_and_nothing_sees_them():
    """But flash_attn_ext.sdpa, which imports its adapter when it is called; that one is about the compiled module."""
    files = sorted(PACKAGE.rglob("*.py"))
    adapters = [path for path in files if "adapters" in path.parts]
    assert {path.name for path in adapters} > {"__init__.py"}
    binary = {f"{PACKAGE.name}._binary.{name}" for name in ("_C", "why_missing")}
    for path in files:
        ours = {name for name in imported(path) if name.split(".")[0] == PACKAGE.name}
        if path in adapters:
            allowed = binary if path.name == "sdpa.py" else set()
            assert all(name == PACKAGE.name or ".adapters" in name for name in ours - allowed), path.name
        else:
            of_adapters = {name for name in ours if ".adapters" in name}
            assert of_adapters == ({f"{PACKAGE.name}.adapters.sdpa"} if path.name == "interface.py" else set()), (
                path.name
            )
