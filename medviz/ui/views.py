"""From results to what the components show. Markup here holds figures and the program's own names, never typed text."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from medviz.domains import DOMAINS
from medviz.rendering import (
    DIFFERENCE_FULL_SCALE,
    DISPLAY_SIDE_PX,
    difference,
    draw_box,
    enlarge,
    mean_difference,
    outline_colours,
    outlines,
    overlay,
    resized_map,
    resized_mask,
    with_footer,
)
from medviz.results import Drawing, Grounding, HeatMap, Mask, Pair, Role, Score, WordAttention

LABEL = "SYNTHETIC"
NO_WORD = "No overlay"
_ROLES: dict[Role, str] = {"judge": "Judge (held out)", "reward": "Training reward"}
NOT_COMPUTED = "not computed"
THUMBNAIL_PX = 150
KEPT_SIDE_PX = 1024
GROUND_SIDE_PX = 640
_NEGLIGIBLE = 0.005  # differences below say nothing of one pair


@dataclass(frozen=True)
class Look:
    """What a person chose to see on the images: a word or None, outlines or not, the overlay's opacity 0 to 1."""

    word: str | None
    outlined: bool
    opacity: float


def shown(drawing: Drawing, heat_map: HeatMap | None, look: Look) -> Image.Image:
    """Return one image at display size with the chosen overlay and outlines, and its label under it."""
    picture = enlarge(drawing.image) if heat_map is None else overlay(drawing.image, heat_map, look.opacity)
    if look.outlined:
        picture = outlines(picture, main_outlines(drawing.outlines))
    return with_footer(picture, LABEL)


def shown_pair(pair: Pair, look: Look) -> tuple[Image.Image, Image.Image]:
    """Return baseline and aligned as `shown`."""
    found = pair.attention(look.word) if look.word else None
    return (
        shown(pair.baseline, found.baseline if found else None, look),
        shown(pair.aligned, found.aligned if found else None, look),
    )


def shown_difference(pair: Pair) -> tuple[Image.Image, str]:
    """Return the difference picture and the sentence under it."""
    picture = with_footer(difference(pair.baseline.image, pair.aligned.image), LABEL)
    mean = mean_difference(pair.baseline.image, pair.aligned.image)
    return picture, (
        f"Mean absolute difference of the two images: {mean:.1f} of 255 grey levels. Black: equal; brightest: a "
        f"difference of {DIFFERENCE_FULL_SCALE} or more. Both images start from the same noise."
    )


def main_outlines(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Leave out regions that only divide another one, the ground around it, and what was not found."""
    found = {name: mask for name, mask in masks.items() if mask.any()}
    return {
        name: mask
        for name, mask in found.items()
        if name != "skin"
        and not any(other != name and _inside(mask, found[other]) for other in found if other != "skin")
    }


def legend(masks: Mapping[str, Mask], look: Look, domain: str, of: str = "in either image") -> str:
    """Return the colour bar of an overlay and the key of the outlines, as markup."""
    parts = []
    if look.word:
        parts.append(
            '<div class="mv-bar" role="img" aria-label="colour scale"></div><div class="mv-bar-ends">'
            f"<span>least attention {of}</span><span>most attention {of}</span></div>"
        )
    if look.outlined:
        colours = outline_colours(list(main_outlines(masks)))
        keys = "".join(
            f'<span><i style="background:{colour}"></i>{_escape(region_label(domain, name))}</span>'
            for name, colour in colours.items()
        )
        parts.append(f'<div class="mv-key">{keys or "No outline was found."}</div>')
    return "".join(parts)


def score_tables(pair: Pair) -> str:
    """Return the scores as one table for each role: the held-out judge's, then the training reward's, folded."""
    heads = ("Score", "Baseline", "Aligned", "Difference")
    tables = {}
    for role, title in _ROLES.items():
        rows = [[_escape(score.name), *_score_cells(score)] for score in pair.scores if score.role == role]
        if rows:
            tables[role] = _table(f"Scores: {title}", heads, rows)
    if "judge" in tables and "reward" in tables:
        tables["reward"] = f"<details><summary>{_ROLES['reward']}</summary>{tables['reward']}</details>"
    return "".join(tables.values())


def _score_cells(score: Score) -> list[str]:
    change = _change(score.baseline, score.aligned, score.higher_is_better)
    return [_number(score.baseline), _number(score.aligned), change]


def region_table(look: WordAttention, domain: str) -> str:
    """Return how much of a term's attention fell on each region as a table."""
    rows = [
        [
            _escape(region_label(domain, region.name)),
            _share(region.baseline_mass),
            _share(region.aligned_mass),
            _number(region.baseline_cnr),
            _number(region.aligned_cnr),
        ]
        for region in look.regions
    ]
    heads = ("Region", "Share, baseline", "Share, aligned", "Contrast, baseline", "Contrast, aligned")
    return (
        _table("Attention of the chosen term by region", heads, rows)
        if rows
        else status("No region was found to measure in.")
    )


def shrunk(grounding: Grounding) -> Grounding:
    """Return the grounding on a grid no larger than the screen needs; the page keeps this one, not the upload."""
    scale = min(1.0, KEPT_SIDE_PX / max(grounding.image.size))
    if scale == 1.0:
        return grounding
    size = (max(1, round(grounding.image.width * scale)), max(1, round(grounding.image.height * scale)))
    box = None if grounding.box is None else [round(value * scale) for value in grounding.box]
    return replace(
        grounding,
        image=grounding.image.resize(size, Image.Resampling.LANCZOS),
        heat_map=resized_map(grounding.heat_map, size),
        outlines={name: resized_mask(mask, size) for name, mask in grounding.outlines.items()},
        box=None if box is None else (box[0], box[1], box[2], box[3]),
    )


def upload(image: Image.Image) -> Image.Image:
    """Return an upload at display size; it is no synthetic image and bears no label."""
    return enlarge(image, GROUND_SIDE_PX)


def shown_grounding(grounding: Grounding, look: Look) -> Image.Image:
    """Return the image with the phrase's heat map, its box and, if chosen, outlines; an upload bears no label."""
    picture = overlay(grounding.image, grounding.heat_map, look.opacity, side_px=GROUND_SIDE_PX)
    if look.outlined:
        picture = outlines(picture, main_outlines(grounding.outlines))
    if grounding.box is not None:
        picture = draw_box(picture, grounding.box, grounding.heat_map.shape)
    return picture


def grounding_table(regions: Sequence[Mapping[str, object]], domain: str) -> str:
    """Return the figures of a grounding as a table."""
    rows = [
        [
            _escape(region_label(domain, str(row["name"]))),
            _share(row["mass"]),
            _share(row["prior_mass"]),
            _number(row["cnr"]),
            _number(row["prior_cnr"]),
        ]
        for row in regions
    ]
    heads = ("Region", "Share", "Share, no image", "Contrast", "Contrast, no image")
    return (
        _table("Attention of the finding by region", heads, rows)
        if rows
        else status("No region was found to measure in.")
    )


def progress_bar(done: int, total: int, text: str) -> str:
    """Return a bar with a fixed text beside it."""
    return (
        f'<div class="mv-progress"><progress max="{total}" value="{done}" aria-label="Progress"></progress>'
        f"<span>{_escape(text)}</span></div>"
    )


def status(text: str) -> str:
    """Return a line that stands where the bar was, and that screen readers speak when they are idle."""
    return f'<div class="mv-progress" role="status"><span>{_escape(text)}</span></div>'


def alert(text: str) -> str:
    """Return a message that screen readers speak at once. text: escaped, as `guard.message` does it."""
    return f'<div class="mv-alert" role="alert">{text}</div>'


def region_label(domain: str, name: str) -> str:
    """Return the words for a region's name."""
    for region in DOMAINS[domain].regions:
        if region.name == name:
            return region.label
    return name.replace("_", " ").capitalize()


def thumbnail(pair: Pair) -> Image.Image:
    """Return both images of a pair side by side, small, with their label."""
    images = [enlarge(drawing.image, THUMBNAIL_PX) for drawing in (pair.baseline, pair.aligned)]
    canvas = Image.new("RGB", (2 * images[0].width + 4, images[0].height), (255, 255, 255))
    canvas.paste(images[0], (0, 0))
    canvas.paste(images[1], (images[0].width + 4, 0))
    return with_footer(canvas, LABEL)


def preview(image: Image.Image) -> Image.Image:
    """Return an unfinished image at display size."""
    return with_footer(enlarge(image, DISPLAY_SIDE_PX), f"{LABEL}, UNFINISHED")


def _inside(mask: Mask, other: Mask) -> bool:
    return bool(mask.sum() < other.sum() and (mask & other).sum() >= 0.95 * mask.sum())


def _escape(text: str) -> str:
    return html.escape(text)


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _number(value: object, decimals: int = 2) -> str:
    number = _finite(value)
    # Adding 0 turns a rounded -0.0 into 0.0.
    return NOT_COMPUTED if number is None else f"{round(number, decimals) + 0.0:.{decimals}f}"


def _share(value: object) -> str:
    number = _finite(value)
    return NOT_COMPUTED if number is None else f"{100 * number:.0f} %"


def _change(baseline: float | None, aligned: float | None, higher_is_better: bool) -> str:
    if _finite(baseline) is None or _finite(aligned) is None:
        return NOT_COMPUTED
    change = float(aligned) - float(baseline)  # type: ignore[arg-type]
    if abs(change) < _NEGLIGIBLE:
        return "≈ same"
    better = (change > 0) == higher_is_better
    arrow, word = ("▲" if change > 0 else "▼"), ("better" if better else "worse")
    return f'<span class="mv-{word}">{arrow} {change:+.2f} {word}</span>'


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    # A table that is wider than its column can be scrolled with the keyboard.
    return (
        f'<div class="mv-scroll" tabindex="0" role="region" aria-label="{_escape(caption)}">'
        f'<table class="mv-table"><caption>{_escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
