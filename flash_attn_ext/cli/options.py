"""Types of command line options."""

import argparse
import re

import torch


def positive_int(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def cpu_or_cuda(text: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or a CUDA device by its number, as cuda:1")
    return torch.device(text)
