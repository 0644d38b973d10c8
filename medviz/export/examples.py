"""Pairs kept on disk, so that the first screen shows pictures, words and scores before any model is loaded.

One folder an example: example.json, baseline.png, aligned.png (bare pixels with provenance), attention.png (heat maps
in 8 bits, one row a word) and regions.png (masks, one row a region); in both the left half is the baseline.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from medviz.errors import InputError, ModelError

if TYPE_CHECKING:
    from medviz.results import Pair

FORMAT_VERSION = 1
EXAMPLE_NAME = "example.json"
_DAMAGED = (OSError, ValueError, KeyError, TypeError, IndexError, SyntaxError)

logger = logging.getLogger(__name__)


def write_example(pair: Pair, folder: Path) -> Path:
    """Write a pair to `folder`, replacing an example that lies there; return the folder.

    Raises InputError when the folder holds something else.
    """
    from medviz.export.archive import image_png

    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / EXAMPLE_NAME).is_file():
            raise InputError(f"{folder} holds files, but no example; choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("baseline", "aligned"):
        (folder / f"{side}.png").write_bytes(image_png(pair, side, labelled=False))
    looks = [pair.attention(word) for word in pair.words]
    regions = [name for name in pair.baseline.outlines if name in pair.aligned.outlines]
    shape = (pair.baseline.image.height, pair.baseline.image.width)
    _write_grid(folder / "attention.png", [(look.baseline, look.aligned) for look in looks], shape)
    masks = [(pair.baseline.outlines[name], pair.aligned.outlines[name]) for name in regions]
    _write_grid(folder / "regions.png", masks, shape)
    content = {
        "format_version": FORMAT_VERSION,
        **pair.report(),
        "regions": regions,
        "attention": [look.report() for look in looks],
        "sampling": dict(pair.sampling),
        "versions": dict(pair.versions),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / EXAMPLE_NAME).write_text(text + "\n", encoding="utf-8")
    return folder


def read_example(folder: Path) -> Pair:
    """Read an example back as a pair whose words can be looked up like those of a fresh one.

    Heat maps come back in steps of 1/255. Raises ModelError for a missing or damaged example.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / EXAMPLE_NAME).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ModelError(f"{folder} has the example format {content['format_version']}, not {FORMAT_VERSION}")
        return _pair(folder, content)
    except _DAMAGED as error:
        raise ModelError(f"the example {folder} is damaged: {error!r}; write it again") from error


def read_examples(folder: Path) -> list[Pair]:
    """Read every example under a folder in the order of their names; damaged ones are logged and left out."""
    pairs = []
    for path in sorted(Path(folder).glob(f"*/{EXAMPLE_NAME}")):
        try:
            pairs.append(read_example(path.parent))
        except ModelError as error:
            logger.warning("an example is left out: %s", error)
    return pairs


def _pair(folder: Path, content: dict[str, Any]) -> Pair:
    from medviz.results import Drawing, Pair, RegionAttention, Score, WordAttention

    images = {}
    for side in ("baseline", "aligned"):
        with Image.open(folder / f"{side}.png") as image:
            images[side] = image.convert("RGB")
    shape = (images["baseline"].height, images["baseline"].width)
    maps = _read_grid(folder / "attention.png", len(content["words"]), shape)
    masks = _read_grid(folder / "regions.png", len(content["regions"]), shape)
    looks = {
        found["word"]: WordAttention(
            word=found["word"],
            baseline=baseline.astype(np.float32) / 255.0,
            aligned=aligned.astype(np.float32) / 255.0,
            regions=tuple(RegionAttention(**region) for region in found["regions"]),
        )
        for found, (baseline, aligned) in zip(content["attention"], maps, strict=True)
    }
    outlines = [
        {name: pair[column] > 127 for name, pair in zip(content["regions"], masks, strict=True)} for column in (0, 1)
    ]

    def look_up(word: str) -> WordAttention:
        if word not in looks:
            raise InputError(f"{word[:60]!r} is not among this example's words: {', '.join(looks)}")
        return looks[word]

    return Pair(
        domain=content["domain"],
        prompt=content["prompt"],
        seed=content["seed"],
        steps=content["steps"],
        guidance_scale=content["guidance_scale"],
        adapter=None if content["adapter"] == "none" else content["adapter"],
        models=content["models"],
        words=tuple(content["words"]),
        baseline=Drawing(images["baseline"], outlines[0]),
        aligned=Drawing(images["aligned"], outlines[1]),
        scores=tuple(Score(**score) for score in content["scores"]),
        warnings=tuple(content["warnings"]),
        timings_s=content["timings_s"],
        look_up=look_up,
        sampling=content.get("sampling", {}),
        versions=content.get("versions", {}),
    )


def _write_grid(path: Path, rows: list[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> None:
    # A picture needs a pixel: no rows are kept as one black row, and read back as none.
    height, width = shape
    grid = np.zeros((max(1, len(rows)) * height, 2 * width), np.uint8)
    for index, row in enumerate(rows):
        for column, values in enumerate(row):
            part = grid[index * height : (index + 1) * height, column * width : (column + 1) * width]
            part[:] = np.rint(values.astype(np.float32) * 255.0)
    Image.fromarray(grid).save(path, optimize=True)


def _read_grid(path: Path, count: int, shape: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    height, width = shape
    with Image.open(path) as image:
        grid = np.array(image.convert("L"))
    if grid.shape != (max(1, count) * height, 2 * width):
        raise ValueError(f"{path.name} has the shape {grid.shape}")
    rows = [grid[index * height : (index + 1) * height] for index in range(count)]
    return [(row[:, :width], row[:, width:]) for row in rows]
