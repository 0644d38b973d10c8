"""`python -m medviz COMMAND ...`: the command line of everything that needs no training."""

import importlib
import os
import sys

# Read by the libraries when they are imported: a command has one progress bar of its own.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from medviz.errors import MedvizError

COMMANDS = {
    "compare": ("medviz.commands.compare", "draw a prompt with the baseline and with the aligned model"),
    "ground": ("medviz.commands.ground", "locate a phrase in images"),
    "reproduce": ("medviz.commands.reproduce", "draw a pair again from its manifest and compare every pixel"),
    "score": ("medviz.commands.score", "score how well images show a prompt"),
    "study": ("medviz.commands.study", "blinded reader study: protocol, plan, simulate, analyse, export"),
}
"""Name -> (module with `main(arguments)`, one line of help). Only the chosen module is imported."""


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:12s} {text}" for name, (_, text) in COMMANDS.items()]
    return (
        "usage: python -m medviz COMMAND ...\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`python -m medviz COMMAND --help` says more.\n"
    )


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status: its own, 1 after an error with a name, 2 for an unknown command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        sys.stderr.write(f"no command {arguments[0]!r}; commands are {', '.join(COMMANDS)}\n")
        return 2
    try:
        return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:]) or 0
    except (MedvizError, OSError) as error:
        sys.stderr.write(f"{arguments[0]}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
