"""Side-by-side measurements: `python -m train bench NAME`."""

import importlib

from medviz.errors import InputError

BENCHMARKS = {
    "pair": ("train.benchmarks.pair", "how long a pair takes, drawn in the same passes and one after the other"),
    "rl": ("train.benchmarks.rl.benchmark", "our reinforcement learning beside TRL's DDPO"),
}


def main(arguments: list[str]) -> None:
    """`python -m train bench NAME [options]`. Raises InputError for a benchmark that does not exist."""
    if not arguments or arguments[0] not in BENCHMARKS:
        known = "; ".join(f"{name}: {text}" for name, (_, text) in BENCHMARKS.items())
        raise InputError(f"name a benchmark ({known}), found {arguments[:1] or 'none'}")
    importlib.import_module(BENCHMARKS[arguments[0]][0]).main(arguments[1:])
