"""A pair as files: PNGs that say they are synthetic, the report, and one zip archive with everything."""

from __future__ import annotations

import io
import json
import zipfile
from typing import TYPE_CHECKING, Literal

from medviz.audit.provenance import Provenance, label, labelled_png, unlabelled_png
from medviz.images import png_bytes
from medviz.rendering import enlarge, figure, overlay

if TYPE_CHECKING:
    from PIL import Image

    from medviz.results import Pair

Side = Literal["baseline", "aligned"]

NOTICE = "Synthetic images. Research demonstration. Not for diagnosis."
FIGURE_WORDS = 4  # rows of attention in the archive's figure
_CELL_PX = 320
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say: the same pair gives the same bytes


def provenance(pair: Pair, side: Side) -> Provenance:
    """How one image of the pair was made."""
    return Provenance(
        domain=pair.domain,
        prompt=pair.prompt,
        seed=pair.seed,
        steps=pair.steps,
        guidance_scale=pair.guidance_scale,
        adapter=pair.adapter if side == "aligned" else None,
        model_sha256=str(pair.models.get("unet", "")),
    )


def image_png(pair: Pair, side: Side, *, labelled: bool = True) -> bytes:
    """Encode one image of the pair to PNG with its provenance, with the visible label or with its bare pixels."""
    drawing = pair.baseline if side == "baseline" else pair.aligned
    encode = labelled_png if labelled else unlabelled_png
    return encode(drawing.image, provenance(pair, side))


def overlay_png(pair: Pair, side: Side, word: str, opacity: float = 0.6) -> bytes:
    """Encode where a word looked on one image of the pair to a labelled PNG with its provenance."""
    drawing = pair.baseline if side == "baseline" else pair.aligned
    look = pair.attention(word)
    heat_map = look.baseline if side == "baseline" else look.aligned
    return labelled_png(overlay(drawing.image, heat_map, opacity), provenance(pair, side))


def report_json(pair: Pair) -> bytes:
    """Encode the report, with the attention figures of every word, to JSON."""
    content = {**pair.report(), "attention": [pair.attention(word).report() for word in pair.words], "notice": NOTICE}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def pair_figure(pair: Pair) -> Image.Image:
    """Draw both images and where their first words looked in one labelled picture."""
    looks = [pair.attention(word) for word in pair.words[:FIGURE_WORDS]]
    columns = []
    for caption, drawing, heat_maps in (
        ("baseline", pair.baseline, [look.baseline for look in looks]),
        (f"aligned ({pair.adapter or 'no adapter'})", pair.aligned, [look.aligned for look in looks]),
    ):
        images = [enlarge(drawing.image, _CELL_PX)]
        images += [overlay(drawing.image, heat_map, side_px=_CELL_PX) for heat_map in heat_maps]
        columns.append((caption, [label(image) for image in images]))
    rows = "".join(f"; row {row}: {look.word}" for row, look in enumerate(looks, start=2))
    return figure(columns, f"{pair.prompt} (seed {pair.seed}){rows}", NOTICE)


def archive(pair: Pair) -> bytes:
    """Pack the pair into a zip: images with and without the visible label, a figure, the report and the notice."""
    files = {
        "baseline.png": image_png(pair, "baseline"),
        "aligned.png": image_png(pair, "aligned"),
        "pixels/baseline.png": image_png(pair, "baseline", labelled=False),
        "pixels/aligned.png": image_png(pair, "aligned", labelled=False),
        "figure.png": png_bytes(pair_figure(pair), provenance(pair, "aligned").png_text()),
        "report.json": report_json(pair),
        "NOTICE.txt": f"{NOTICE}\n".encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(name, _ZIP_DATE), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
