"""What benchmarks of seconds have in common: a clock, and where the figures go."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """(seconds, result) of `work`."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def write(found: Mapping[str, Any], out: str) -> None:
    """Write figures as JSON to standard output and, where it is named, to the file `out`."""
    text = json.dumps(found, indent=1) + "\n"
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text)
    sys.stdout.write(text)
