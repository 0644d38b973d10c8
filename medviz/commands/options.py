"""What the commands share: options, values as the limits check them, files, and what is written to the screen."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from medviz.errors import InputError
from medviz.results import Score
from medviz.studio import Studio

Found = TypeVar("Found")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A command's parser with the options that every command has."""
    made = argparse.ArgumentParser(f"python -m medviz {command}", description=description)
    made.add_argument(
        "--models",
        metavar="FOLDER",
        default=os.environ.get("MEDVIZ_MODELS") or None,
        help="folder of model folders (default: MEDVIZ_MODELS, else those that come with medviz)",
    )
    made.add_argument("--device", help="torch device (default: CUDA where there is one, else the CPU)")
    made.add_argument("--json", action="store_true", help="write the result to standard output as JSON")
    return made


def add_folder(command: argparse.ArgumentParser, what: str) -> None:
    """Add the option that names the folder for results."""
    command.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {what} to this new or empty folder")


def studio(options: argparse.Namespace) -> Studio:
    """The studio that the options ask for."""
    return Studio(options.models, options.device)


def number(text: str) -> int | float | str:
    """A number as JSON has it; other text as it is, so that the limits refuse it in the same words as on the API."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_folder(folder: Path | None) -> None:
    """Raise InputError where the folder for results holds anything, before time is spent on them."""
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no empty folder; name another one for the results")


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Write files to a folder, making it and folders in it; return their paths."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [str(folder / name) for name in files]


def read_images(paths: Sequence[Path], read: Callable[[Path], Found]) -> Iterator[tuple[Path, Found]]:
    """What `read` finds in each image, with a progress bar on a terminal. Of several images an InputError names one."""
    for path in tqdm(paths, unit="image", disable=None):
        try:
            found = read(path)
        except InputError as error:
            raise error if len(paths) == 1 else InputError(f"{path}: {error}") from error
        yield path, found


def score_lines(scores: Iterable[Score]) -> list[str]:
    """A line a score that was computed."""
    lines = []
    for score in scores:
        values = [value for value in (score.baseline, score.aligned) if value is not None]
        if values:
            lines.append(f"  {score.role:7s} {score.name:28s} " + "  ".join(f"{value:.3f}" for value in values))
    return lines


def tell(options: argparse.Namespace, content: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Write the result to standard output: as JSON where it was asked for, else in lines."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) if options.json else "\n".join(lines)
    sys.stdout.write(text + "\n")
