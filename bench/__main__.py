"""
Measure times and memory, and print Markdown tables as in docs/bench.md.

    python -m bench all --budget 840                    # all that a GPU can, in 840 seconds: out/bench/report.md
    python -m bench smoke                               # whether the kernels are right on this machine
    python -m bench kernels                             # the operations of the masking path; on a GPU in Triton
    python -m bench kernels --quick --sweep             # one shape, 8 frames a clip; launch sizes against time
    python -m bench kernels --device cpu                # the PyTorch references, and the table of `compile`
    python -m bench kernels --teacher out/demo/seed0/teacher    # visible ids beside fp64, on a teacher's features
    python -m bench step                                # a pretraining step and its parts
    python -m bench step --umt unmasked_teacher         # beside UMT's step, from a checkout of its code
    python -m bench reading --folder out/videos --rate 900      # clips/s of a core, beside torchcodec and decord
    python -m bench memory --workers 8                  # memory of large annotation files
    python -m bench compile --targets sm_90             # registers, spills, shared memory; needs no GPU

Start a command with --help for its options. The docstrings of the modules in bench/ say how they measure.
"""

import importlib
import sys

import tyro

from runtime import run_cli

# Modules of bench/ with a Config and main(cfg).
COMMANDS = ("all", "smoke", "kernels", "step", "reading", "memory", "compile")


def parse(args: list[str]):
    """
    Parse a command line -> the Config of its command.

    Only the module of this command is imported: that keeps the processes light which `compile` and `memory` start.
    """
    load_config = lambda name: importlib.import_module(f"bench.{name}").Config
    if args and args[0] in COMMANDS:
        return tyro.cli(load_config(args[0]), args=args[1:], prog=f"python -m bench {args[0]}")
    return tyro.extras.subcommand_cli_from_dict({name: load_config(name) for name in COMMANDS}, args=args,
                                                prog="python -m bench", description=__doc__)


def cli():
    """Parse the command line and run its command."""
    cfg = parse(sys.argv[1:])
    sys.modules[type(cfg).__module__].main(cfg)


if __name__ == "__main__":
    run_cli("bench", cli)
