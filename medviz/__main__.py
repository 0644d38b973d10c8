"""`python -m medviz COMMAND ...`: the command line of everything that needs no training."""

import importlib
import sys

from medviz.errors import MedvizError

COMMANDS = {
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
    """Run one command; returns the exit status: 0, 1 after an error with a name, 2 for an unknown command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        sys.stderr.write(f"no command {arguments[0]!r}; commands are {', '.join(COMMANDS)}\n")
        return 2
    try:
        importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    except MedvizError as error:
        sys.stderr.write(f"{arguments[0]}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
