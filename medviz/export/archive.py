"""A pair as files: PNGs that say they are synthetic, attention maps, the report, and a manifest to draw it again from.

Pictures to be shared carry a visible label, a watermark and, where a certificate is configured, content credentials.
Pictures under pixels/ and maps/ are the values as they were drawn: with PNG text, without label and watermark.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from medviz.audit.credentials import signed_png
from medviz.audit.provenance import Provenance, label, labelled_png, unlabelled_png
from medviz.audit.watermark import embed
from medviz.export.reproduction import MANIFEST_NAME, manifest
from medviz.images import png_bytes
from medviz.rendering import draw_box, enlarge, figure, overlay

if TYPE_CHECKING:
    from medviz.results import Grounding, HeatMap, Pair

Side = Literal["baseline", "aligned"]
SIDES: tuple[Side, Side] = ("baseline", "aligned")

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
    encode = labelled_png if labelled else unlabelled_png
    return encode(getattr(pair, side).image, provenance(pair, side))


def overlay_png(pair: Pair, side: Side, word: str, opacity: float = 0.6) -> bytes:
    """Encode a word's attention over one image of the pair to a labelled PNG with its provenance."""
    heat_map = getattr(pair.attention(word), side)
    return labelled_png(overlay(getattr(pair, side).image, heat_map, opacity), provenance(pair, side))


def shared_picture(pair: Pair, side: Side) -> Image.Image:
    """Return one image of the pair as it is given away: with its visible label and its watermark."""
    return embed(label(getattr(pair, side).image))


def map_png(heat_map: HeatMap, text: Mapping[str, str]) -> bytes:
    """Encode a map float32 (H, W) in [0, 1] to a 16-bit grey PNG, whose value over 65535 is the map's."""
    levels = np.rint(np.clip(heat_map, 0.0, 1.0).astype(np.float64) * 65535.0).astype(np.uint16)
    return png_bytes(Image.fromarray(levels), text)


def report_json(pair: Pair) -> bytes:
    """Encode the report, with the attention figures of every word, to JSON."""
    content = {**pair.report(), "attention": [pair.attention(word).report() for word in pair.words], "notice": NOTICE}
    return json_bytes(content)


def json_bytes(content: Mapping[str, object]) -> bytes:
    """Encode to strict JSON: None for what was not computed, and no NaN."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def pair_figure(pair: Pair) -> Image.Image:
    """Draw both images and the attention of their first words in one labelled picture."""
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


def pair_files(pair: Pair) -> dict[str, bytes]:
    """Return every file of the pair's archive by its name; `manifest.json` says what each picture is.

    Maps and overlays are numbered: no word is ever part of a name. Raises ExportError as
    `medviz.audit.credentials.signed_png`.
    """
    text = {side: provenance(pair, side).png_text() for side in SIDES}
    pictures = {f"{side}.png": png_bytes(shared_picture(pair, side), text[side]) for side in SIDES}
    pictures |= {f"pixels/{side}.png": image_png(pair, side, labelled=False) for side in SIDES}
    maps = []
    for number, word in enumerate(pair.words, start=1):
        look, entry = pair.attention(word), {"word": word}
        for side in SIDES:
            entry[side] = f"maps/{number:02d}-{side}.png"
            pictures[entry[side]] = map_png(getattr(look, side), {**text[side], "Word": word})
            pictures[f"overlays/{number:02d}-{side}.png"] = overlay_png(pair, side, word)
        maps.append(entry)
    pictures["figure.png"] = png_bytes(pair_figure(pair), text["aligned"])
    return {
        **{name: signed_png(content, name) for name, content in pictures.items()},
        "report.json": report_json(pair),
        MANIFEST_NAME: json_bytes(manifest(pair, maps, pictures)),
        "NOTICE.txt": f"{NOTICE}\n".encode(),
    }


def archive(pair: Pair) -> bytes:
    """Pack the files of a pair into a zip. Without content credentials the same pair gives the same bytes."""
    return packed(pair_files(pair))


def packed(files: Mapping[str, bytes]) -> bytes:
    """Pack files into a zip; the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed_files:
        for name, content in files.items():
            packed_files.writestr(zipfile.ZipInfo(name, _ZIP_DATE), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def grounding_files(found: Grounding) -> dict[str, bytes]:
    """Return a grounding as files: the overlay with its box, the map in 16 bits, and the report.

    The image is the person's own, so nothing is marked as synthetic.
    """
    picture = overlay(found.image, found.heat_map, side_px=max(found.image.size))
    if found.box is not None:
        picture = draw_box(picture, found.box, found.heat_map.shape)
    return {
        "overlay.png": png_bytes(picture),
        "map.png": map_png(found.heat_map, {"Phrase": found.phrase}),
        "report.json": json_bytes(found.report()),
    }
