"""Contact sheets: one row a prompt, the same seeds from the baseline on the left and an aligned model on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medviz.images import png_bytes

PAPER, INK, FAINT = (255, 255, 255), (28, 36, 48), (110, 118, 130)
PAD_PX, LINE_PX, FONT_PX = 6, 18, 13


def evenly_spaced(count: int, chosen: int) -> list[int]:
    """`chosen` indices of range(count), spread over it and never one twice; all of them where there are fewer."""
    if count <= chosen:
        return list(range(count))
    return [round(index * (count - 1) / (chosen - 1)) for index in range(chosen)] if chosen > 1 else [0]


def contact_sheet(
    prompts: Sequence[str],
    baseline: np.ndarray,
    aligned: np.ndarray,
    *,
    title: str,
    columns: Sequence[str],
    names: tuple[str, str] = ("baseline", "aligned"),
) -> Image.Image:
    """A labelled picture of P prompts by S seeds by two models.

    baseline and aligned are uint8 (P, S, H, W, 3), position (p, s) of both drawn from the same noise; columns are the
    S labels of the seeds. Raises ValueError where the shapes do not belong together.
    """
    if baseline.shape != aligned.shape or baseline.shape[:2] != (len(prompts), len(columns)):
        raise ValueError(f"{len(prompts)} prompts x {len(columns)} seeds for {baseline.shape} and {aligned.shape}")
    _, seeds, height, width = baseline.shape[:4]
    half = seeds * (width + PAD_PX)
    gap = 3 * PAD_PX
    canvas_width = 2 * half + gap + PAD_PX
    font = ImageFont.load_default(size=FONT_PX)
    heading = _wrapped(title, font, canvas_width - 2 * PAD_PX)
    labels = [_wrapped(prompt, font, canvas_width - 2 * PAD_PX) for prompt in prompts]
    top = PAD_PX + LINE_PX * (len(heading) + 2)
    total = top + sum(LINE_PX * len(lines) + height + 2 * PAD_PX for lines in labels)
    canvas = Image.new("RGB", (canvas_width, total), PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(heading):
        pen.text((PAD_PX, PAD_PX + number * LINE_PX), line, fill=INK, font=font)
    lefts = (PAD_PX, PAD_PX + half + gap)
    for left, name in zip(lefts, names, strict=True):
        pen.text((left, top - 2 * LINE_PX), name, fill=INK, font=font)
        for seed, label in enumerate(columns):
            pen.text((left + seed * (width + PAD_PX), top - LINE_PX), label, fill=FAINT, font=font)
    y = top
    for row, lines in enumerate(labels):
        for line in lines:
            pen.text((PAD_PX, y), line, fill=INK, font=font)
            y += LINE_PX
        for left, images in zip(lefts, (baseline, aligned), strict=True):
            for seed in range(seeds):
                canvas.paste(Image.fromarray(images[row, seed]), (left + seed * (width + PAD_PX), y))
        y += height + 2 * PAD_PX
    return canvas


def write_sheet(path: Path, sheet: Image.Image, text: dict[str, str]) -> None:
    """Write a sheet as PNG with text metadata that says what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(sheet, text))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
