"""`python -m medviz COMMAND`: what the app does, on the command line."""

import importlib
import os
import sys

# Read by the libraries when they are imported: a command has one progress bar of its own.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from medviz.errors import MedvizError

COMMANDS: dict[str, str] = {
    "compare": "medviz.commands.compare",
    "ground": "medviz.commands.ground",
    "reproduce": "medviz.commands.reproduce",
    "score": "medviz.commands.score",
}
USAGE = f"usage: python -m medviz {{{','.join(COMMANDS)}}} ...\n`python -m medviz COMMAND --help` lists its options.\n"


def main(argv: list[str]) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed with a message, 2 asked in the wrong way."""
    if argv[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return 0
    if not argv or argv[0] not in COMMANDS:
        sys.stderr.write(USAGE)
        return 2
    try:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    except (MedvizError, OSError) as error:
        sys.stderr.write(f"{argv[0]}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
