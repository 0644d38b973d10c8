"""What ships is written over only where a command line says so, with `--ship`."""

import logging
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (ROOT / "assets", ROOT / "README.md")
"""What a copy of the project brings."""
BESIDE = Path("runs/unshipped")
"""Where the same lies that a command without `--ship` wrote."""
OPTION = "--ship"

logger = logging.getLogger(__name__)
_allowed = False


def take_option(arguments: list[str]) -> list[str]:
    """`arguments` without `--ship`; whether it was among them decides what `place` does from here on."""
    global _allowed
    _allowed = OPTION in arguments
    return [each for each in arguments if each != OPTION]


def place(path: str | Path) -> Path:
    """Where what is meant for `path` is written: there, or under runs/unshipped where it ships and `--ship` is not
    given."""
    path = Path(path)
    absolute = path.resolve()
    if _allowed or not any(absolute.is_relative_to(each) for each in SHIPPED):
        return path
    beside = BESIDE / absolute.relative_to(ROOT)
    logger.info("writes to %s; with %s to %s", beside, OPTION, path)
    return beside
