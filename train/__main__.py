"""`python -m train STAGE RECIPE [overrides]`: the one door to every training stage."""

import importlib
import logging
import sys

from medviz.errors import MedvizError
from train import processes, shipping
from train.stages import SHARED, STAGES


def usage() -> str:
    """The stages, a line each."""
    lines = [f"  {name:15s} {text}" for name, (_, text) in STAGES.items()]
    return "\n".join(
        [
            "usage: python -m train run DOMAIN [--dry-run]",
            "       python -m train STAGE RECIPE [--option value ...]",
            "",
            "stages:",
            *lines,
            "",
            "`python -m train STAGE RECIPE --help` lists a stage's options.",
            f"Without {shipping.OPTION}, what is meant for assets/ or README.md goes to {shipping.BESIDE}/.",
        ]
    )


def main(arguments: list[str]) -> int:
    """Run one stage; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        return 0 if arguments else 2
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    stage, rest = arguments[0], shipping.take_option(arguments[1:])
    if stage not in STAGES:
        sys.stderr.write(f"no stage {stage!r}; stages are {', '.join(STAGES)}\n")
        return 2
    try:
        if stage not in SHARED:
            processes.refuse_several(stage)
        importlib.import_module(STAGES[stage][0]).main(rest)
    except MedvizError as error:
        sys.stderr.write(f"{stage}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
