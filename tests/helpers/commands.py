"""Parse the command lines that pages and the demo give."""

import functools
import importlib
import shlex

import tyro

import train


def parse(line):
    """Parse `SCRIPT ARGS` or `-m MODULE ARGS` -> (script or module, settings). SystemExit if it does not parse."""
    name, *args = shlex.split(line)
    if name == "-m":
        name, *args = args
    if name == "train.py":
        if "finetune" in args:                  # its defaults come from a folder that does not exist here
            default = train.replace(train.PRESETS["sprites"], stage="finetune")
        else:
            default, args, _ = train.split_defaults(args)
        return name, tyro.cli(train.Config, args=args, default=default)
    module = importlib.import_module(name.removesuffix(".py") if name != "bench" else "bench.__main__")
    if name == "tools.sprites":
        return name, tyro.cli(functools.wraps(module.write_sprites)(lambda **settings: settings), args=args)
    if name == "bench":
        return name, module.parse(args)
    if hasattr(module, "COMMANDS"):
        return name, tyro.extras.subcommand_cli_from_dict(module.COMMANDS, args=args)
    return name, tyro.cli(module.Config, args=args)
