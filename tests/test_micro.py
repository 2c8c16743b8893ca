"""The microbenchmarks, as far as they go without a GPU: their tables, their JSON, and the instructions they count.

`make test` has built them (CMakeLists.txt); elsewhere these tests are skipped.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest
from test_sass import find_cuobjdump

ROOT = Path(__file__).parents[1]
BUILD = next((path for path in (ROOT / "build/cmake", ROOT / "build-cmake") if (path / "micro_wgmma").exists()), None)
# Of each, instructions that its loops must hold: the compiler drops what nobody uses, and then a loop looks fast.
INSTRUCTIONS = {
    "wgmma": [f"HGMMA.64x{n}x16.F32{dtype}" for n in (64, 80, 128, 256) for dtype in ("", ".BF16")],
    "exp2": ["HGMMA.64x128x16.F32.BF16", "MUFU.EX2", "FFMA", "FMNMX"],
    "load": ["UTMALDG.4D"],
    "reduce": ["UBLKRED.G.S.ADD.F32.RN", "UBLKCP.G.S", "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU"],
    "forward": ["HGMMA.64x80x16.F32.BF16"],
    "backward": ["HGMMA.64x128x16.F32.BF16", "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU"],
}

pytestmark = pytest.mark.skipif(BUILD is None, reason="the microbenchmarks are not built: make host-tests")
each = pytest.mark.parametrize("name", INSTRUCTIONS)


def run(name, *arguments):
    return subprocess.run([BUILD / f"micro_{name}", *arguments], capture_output=True, text=True)


def test_all_are_known():
    assert sorted(INSTRUCTIONS) == sorted(path.stem for path in (ROOT / "benchmarks/micro").glob("*.cu"))


@each
def test_dry_run_writes_the_table(name, tmp_path):
    done = run(name, "--dry-run", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["benchmark"] == name and written["environment"] == {}
    assert len(written["rows"]) == len(done.stdout.splitlines()) - 1 > 0
    assert all(row.keys() == written["rows"][0].keys() for row in written["rows"])
    assert any("percent" in key for key in written["rows"][0])


@each
def test_arguments(name):
    assert "--json" in run(name, "--help").stdout
    for wrong in (["--no-such-option"], ["--json"], ["--dry-run", "nonsense"], ["--seconds", "x"]):
        done = run(name, *wrong)
        assert done.returncode == 2 and "--help" in done.stderr, wrong


@each
def test_counted_instructions_are_there(name):
    tool = find_cuobjdump()
    sass = subprocess.run([tool, "-sass", BUILD / f"micro_{name}"], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", sass, re.MULTILINE))
    assert set(INSTRUCTIONS[name]) - found == set()
    if name == "wgmma":  # six shapes, two types; each one loop, not unrolled: the eight steps of a product
        products = [len(re.findall(r"HGMMA\.64x\d+x16", function)) for function in sass.split("Function : ")[1:]]
        assert sorted(products) == [0] + 12 * [8]
