"""The command line, `python -m flash_attn_ext`: a module for each command, with its options and a `run`."""

import argparse

from . import bench, check, info, selftest

DESCRIPTION = "Exact attention for Hopper GPUs: what is installed, whether a model fits, whether it is right, how fast."


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m flash_attn_ext", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (info, check, selftest, bench):
        summary, _, details = module.__doc__.partition("\n")
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=f"{summary}\n{details.rstrip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return options.run(options)
