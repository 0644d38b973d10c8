"""Pictures for people: enlarged images, attention overlays, region outlines, differences, figures.

Everything takes and returns PIL RGB images and numpy arrays; nothing here knows a model. Heat maps are float (H, W) in
[0, 1] on the image's own grid, masks are bool (H, W).
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medviz.errors import InputError

DISPLAY_SIDE_PX = 448  # the longer side of an image on the screen
DIFFERENCE_FULL_SCALE = 128  # grey levels of 255 that the difference view draws in its brightest colour
# Okabe and Ito's palette without black: told apart by most colour-blind readers, on skin as on X-rays.
OUTLINE_COLOURS = (
    (86, 180, 233),
    (240, 228, 66),
    (0, 158, 115),
    (230, 159, 0),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
_INK = (28, 36, 48)
_PAPER = (255, 255, 255)


def enlarge(image: Image.Image, side_px: int = DISPLAY_SIDE_PX) -> Image.Image:
    """Return the image with its longer side at side_px (Lanczos), for the screen only; larger images are shrunk."""
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def colour_map(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return RGB uint8 (..., 3) of values (H, W) in [0, 1] in the viridis colours; NaN counts as 0."""
    levels = np.rint(np.clip(np.nan_to_num(values), 0.0, 1.0) * 255.0).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def overlay(
    image: Image.Image, heat_map: NDArray[np.floating], opacity: float = 0.6, side_px: int = DISPLAY_SIDE_PX
) -> Image.Image:
    """Lay a heat map (H, W) in [0, 1] over the enlarged image.

    The colour's share grows with the heat, from 0 where the heat is 0 to `opacity` from a third of the scale on, so
    that what the word did not look at stays readable. Raises InputError when the map has another aspect ratio.
    """
    if heat_map.ndim != 2 or heat_map.shape[0] * image.width != heat_map.shape[1] * image.height:
        raise InputError(f"a heat map of shape {heat_map.shape} does not fit an image of {image.height, image.width}")
    picture = enlarge(image, side_px)
    heat = cv2.resize(np.asarray(heat_map, np.float32), picture.size, interpolation=cv2.INTER_CUBIC)
    heat = np.clip(heat, 0.0, 1.0)
    share = (float(np.clip(opacity, 0.0, 1.0)) * np.clip(heat * 3.0, 0.0, 1.0))[..., None]
    mixed = np.asarray(picture, np.float32) * (1.0 - share) + colour_map(heat).astype(np.float32) * share
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def outlines(picture: Image.Image, masks: Mapping[str, NDArray[np.bool_]], width_px: int = 2) -> Image.Image:
    """Draw the contour of every mask (H, W), each region in its own colour, on an image already at display size."""
    canvas = np.array(picture.convert("RGB"))
    for colour, mask in zip(_cycle(len(masks)), masks.values(), strict=True):
        levels = cv2.resize(mask.astype(np.uint8) * 255, picture.size, interpolation=cv2.INTER_LINEAR)
        contours, _ = cv2.findContours((levels > 127).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        # A dark line under the coloured one keeps it visible on bright bone and on pale skin.
        cv2.drawContours(canvas, contours, -1, (0, 0, 0), width_px + 2, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, colour, width_px, cv2.LINE_AA)
    return Image.fromarray(canvas)


def draw_box(picture: Image.Image, box: Sequence[float], grid_hw: tuple[int, int]) -> Image.Image:
    """Draw a box (x0, y0, x1, y1), given on a grid of grid_hw pixels, on an image at display size."""
    canvas = picture.convert("RGB").copy()
    scale_x, scale_y = canvas.width / grid_hw[1], canvas.height / grid_hw[0]
    corners = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x - 1, box[3] * scale_y - 1)
    drawing = ImageDraw.Draw(canvas)
    drawing.rectangle(corners, outline=(0, 0, 0), width=4)
    drawing.rectangle(tuple(c + d for c, d in zip(corners, (1, 1, -1, -1), strict=True)), outline=_PAPER, width=2)
    return canvas


def resized_map(heat_map: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize a heat map to (width, height) as PIL names sizes; float32 in [0, 1]."""
    shrinks = size[0] < heat_map.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.clip(cv2.resize(np.asarray(heat_map, np.float32), size, interpolation=interpolation), 0.0, 1.0)


def resized_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a mask to (width, height) as PIL names sizes."""
    return cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR) > 127


def with_footer(picture: Image.Image, text: str) -> Image.Image:
    """Set a black strip with white letters under a picture; nothing of the picture is covered."""
    height_px = max(18, round(picture.width * 0.05))
    canvas = Image.new("RGB", (picture.width, picture.height + height_px), (0, 0, 0))
    canvas.paste(picture.convert("RGB"), (0, 0))
    ImageDraw.Draw(canvas).text(
        (picture.width / 2, picture.height + height_px / 2),
        text,
        fill=_PAPER,
        font=ImageFont.load_default(size=round(height_px * 0.62)),
        anchor="mm",
    )
    return canvas


def outline_colours(names: Sequence[str]) -> dict[str, str]:
    """Return the colour of each region's outline as #rrggbb, in the order `outlines` draws them."""
    return {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in zip(names, _cycle(len(names)), strict=True)}


def difference(baseline: Image.Image, aligned: Image.Image, side_px: int = DISPLAY_SIDE_PX) -> Image.Image:
    """Return the mean absolute difference of the colour channels, black 0 to bright DIFFERENCE_FULL_SCALE and above."""
    if baseline.size != aligned.size:
        raise InputError(f"images of {baseline.size} and {aligned.size} pixels cannot be compared pixel by pixel")
    levels = np.abs(np.asarray(baseline.convert("RGB"), np.float32) - np.asarray(aligned.convert("RGB"), np.float32))
    scaled = np.clip(levels.mean(axis=-1) / DIFFERENCE_FULL_SCALE, 0.0, 1.0)
    mapped = cv2.applyColorMap(np.rint(scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return enlarge(Image.fromarray(cv2.cvtColor(mapped, cv2.COLOR_BGR2RGB)), side_px)


def mean_difference(baseline: Image.Image, aligned: Image.Image) -> float:
    """Return the mean absolute difference of two images of one size in grey levels, 0 to 255."""
    pair = [np.asarray(image.convert("RGB"), np.float32) for image in (baseline, aligned)]
    return float(np.abs(pair[0] - pair[1]).mean())


def figure(columns: Sequence[tuple[str, Sequence[Image.Image]]], title: str, footer: str) -> Image.Image:
    """Set captioned columns of images of one size into one labelled picture, as it stands in an exported archive.

    columns: (caption, images from top to bottom); every column holds the same number of images.
    """
    if not columns or len({len(images) for _, images in columns}) != 1:
        raise InputError("a figure needs at least one column, and columns of one length")
    cell = columns[0][1][0].size
    pad, line = 12, 22
    width = pad + len(columns) * (cell[0] + pad)
    rows = len(columns[0][1])
    title_lines = _wrap(title, width - 2 * pad)
    top = pad + line * (len(title_lines) + 1)
    canvas = Image.new("RGB", (width, top + rows * (cell[1] + pad) + line), _PAPER)
    drawing = ImageDraw.Draw(canvas)
    for number, text in enumerate(title_lines):
        drawing.text((pad, pad + number * line), text, fill=_INK, font=_font())
    for column, (caption, images) in enumerate(columns):
        left = pad + column * (cell[0] + pad)
        drawing.text((left, top - line), caption, fill=_INK, font=_font())
        for row, image in enumerate(images):
            canvas.paste(image.convert("RGB"), (left, top + row * (cell[1] + pad)))
    drawing.text((pad, canvas.height - line), footer, fill=_INK, font=_font())
    return canvas


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=14)


def _wrap(text: str, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [OUTLINE_COLOURS[index % len(OUTLINE_COLOURS)] for index in range(count)]
