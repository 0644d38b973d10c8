"""One method on one seed in a program of its own: `python -m train.benchmarks.rl.side REQUEST.json ANSWER.json`.

A program of its own, so that its peak memory is its own and the peer may live in another environment.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from medviz.errors import InputError
from train.benchmarks.rl.task import Work, measured, peak_bytes

OPENERS = {
    "ddpo": "train.benchmarks.rl.ours",
    "forward": "train.benchmarks.rl.ours",
    "draft": "train.benchmarks.rl.ours",
    "trl": "train.benchmarks.rl.peer",
}


def main(arguments: list[str]) -> None:
    """Do the work that the first file asks for and write what was measured to the second.

    Raises InputError for a method that there is no side for.
    """
    asked, answer = map(Path, arguments)
    content = json.loads(asked.read_text())
    work = Work(**{**content, "prompts": tuple(content["prompts"])})
    if work.method not in OPENERS:
        raise InputError(f"no side for {work.method!r}; allowed are {', '.join(OPENERS)}")
    torch.set_num_threads(work.threads)
    opener = importlib.import_module(OPENERS[work.method])
    ready_bytes = peak_bytes()
    answer.write_text(json.dumps(measured(opener.opened(work), work, ready_bytes), allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
