"""Contact sheets of counterfactual images: each addition without, with, and as its mask."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from medviz.errors import InputError
from train.datasets.counterfactuals import Counterfactual, Family, family
from train.datasets.split import Split, open_split
from train.evaluate.contact_sheet import FONT_PX, INK, LINE_PX, PAD_PX, PAPER, write_sheet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CounterfactualsConfig:
    """A contact sheet of a family of additions.

    domain, family: as in train.datasets.counterfactuals.FAMILIES. out: the PNG file. split: train, validation or test.
    attributes: a group of rows each; none names all that the family draws. count: pairs an attribute. size_px: side of
    a picture. place: where every addition must lie, empty for anywhere. root: the images' folder, else MEDVIZ_DATA.
    """

    domain: str
    family: str
    out: Path
    split: str = "train"
    attributes: tuple[str, ...] = ()
    count: int = 8
    size_px: int = 192
    place: str = ""
    seed: int = 0
    root: str | None = None


def samples(
    drawing: Family, split: Split, attribute: str, count: int, seed: int, size_px: int = 256, place: str = ""
) -> list[Counterfactual]:
    """`count` counterfactuals of images drawn at random; fewer where the images do not allow so many.

    Raises InputError where no image of the split may take the attribute.
    """
    eligible = drawing.eligible(split, attribute)
    if len(eligible) == 0:
        raise InputError(f"no image of {split.domain} {split.name} may take {attribute!r}")
    rng = np.random.default_rng(seed)
    found: list[Counterfactual] = []
    for _ in range(4 * count):
        if len(found) == count:
            break
        made = drawing.add(split, int(rng.choice(eligible)), attribute, rng, size_px, place or None)
        found += [] if made is None else [made]
    return found


def sheet(groups: Sequence[Sequence[Counterfactual]]) -> Image.Image:
    """A group of three rows (without, with, mask) for each attribute, under the attribute and each place."""
    groups = [group for group in groups if group]
    if not groups:
        raise InputError("no counterfactual image to show")
    side = groups[0][0].image.shape[0]
    height = 3 * side + 2 * LINE_PX + PAD_PX
    width = max(map(len, groups)) * (side + PAD_PX) + PAD_PX
    canvas = Image.new("RGB", (width, len(groups) * height + PAD_PX), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=FONT_PX)
    for row, group in enumerate(groups):
        top = PAD_PX + row * height
        pen.text((PAD_PX, top), f"{group[0].attribute}: without, with, mask", fill=INK, font=font)
        for column, pair in enumerate(group):
            left = PAD_PX + column * (side + PAD_PX)
            pen.text((left, top + LINE_PX), pair.place or "no single place", fill=INK, font=font)
            shown = np.concatenate([pair.without, pair.image, np.repeat(_grey(pair.mask), 3, axis=2)])
            canvas.paste(Image.fromarray(shown), (left, top + 2 * LINE_PX))
    return canvas


def _grey(mask: np.ndarray) -> np.ndarray:
    return np.rint(mask * 255).astype(np.uint8)[..., None]


def run(config: CounterfactualsConfig) -> Path:
    """Draw and write the sheet; returns its path. Raises InputError on an unknown family, attribute or split."""
    drawing = family(config.domain, config.family)
    split = open_split(config.domain, config.split, config.root)
    names = config.attributes or drawing.attributes
    groups = [samples(drawing, split, name, config.count, config.seed, config.size_px, config.place) for name in names]
    text = {key: str(value) for key, value in dataclasses.asdict(config).items() if key not in ("out", "root")}
    write_sheet(config.out, sheet(groups), text)
    logger.info("%d pairs in %s", sum(map(len, groups)), config.out)
    return config.out


def main(arguments: list[str]) -> None:
    """`python -m train counterfactuals --domain dermatology --family a --out FILE`."""
    run(tyro.cli(CounterfactualsConfig, args=arguments, prog="python -m train counterfactuals"))
