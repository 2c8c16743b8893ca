"""What every test file shares: markers, seeds, and a guard against kernels that hang."""

import faulthandler
import os
import random
import sys
import threading
from pathlib import Path

import pytest
import torch

import flash_attn_ext
from flash_attn_ext import limits

SEED = int(os.environ.get("FLASH_ATTN_EXT_SEED") or random.SystemRandom().randrange(2**32))
HANG_SECONDS = 150  # far above any test here; a kernel that never ends cannot be interrupted, only the process can


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a Hopper GPU, skipped elsewhere")
    config.addinivalue_line("markers", "quick: a first look at correctness, seconds on a GPU")
    config.addinivalue_line("markers", "network: installs from the network, which takes minutes; runs with -m network")
    # The real stderr, since a test's own is captured and lost when the process is ended.
    config.real_stderr = os.fdopen(os.dup(sys.__stderr__.fileno()), "w")


def pytest_collection_modifyitems(config, items):
    if "network" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="installs from the network, which takes minutes: -m network"))


def pytest_terminal_summary(terminalreporter):
    # `python -m pytest` in a checkout tests its source tree, `pytest` the installed package.
    terminalreporter.write_line(f"flash_attn_ext of {Path(flash_attn_ext.__file__).parent}")
    terminalreporter.write_line(f"FLASH_ATTN_EXT_SEED={SEED} repeats the random shapes of this run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if item.get_closest_marker("network"):  # it waits for commands, each of which has its own time
        return (yield)

    def abandon():
        stderr = item.config.real_stderr
        print(f"\n{item.nodeid} has not ended after {HANG_SECONDS} s; giving up", file=stderr, flush=True)
        faulthandler.dump_traceback(file=stderr)
        os._exit(1)

    watchdog = threading.Timer(HANG_SECONDS, abandon)
    watchdog.daemon = True
    watchdog.start()
    try:
        return (yield)
    finally:
        watchdog.cancel()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=[row["head_dim"] for row in limits.TABLE if row["forward"]], ids=lambda head_dim: f"d{head_dim}")
def forward_only(request, monkeypatch):
    """The largest head dim of a row that runs and, as Python's table says for the time of the test, does not train.

    The compiled module says yes by its own table to calls that ask for no option; with one it leaves them to Python.
    """
    rows = [row | {"backward": None} if row["head_dim"] == request.param else row for row in limits.TABLE]
    monkeypatch.setattr(limits, "TABLE", rows)
    return request.param
