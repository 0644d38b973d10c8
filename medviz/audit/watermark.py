"""An invisible mark in shared pictures, read back after JPEG compression.

A spread-spectrum mark (Cox et al. 1997, "Secure spread spectrum watermarking for multimedia") in the 8 x 8 DCT blocks
that JPEG itself uses: a fixed sequence of +1 and -1, times a strength, is added to seven low-frequency luma
coefficients of every block. The reader correlates a picture's coefficients with the sequence. It needs neither the
original nor a model, and reads one fact: the picture was written by medviz.

The mark labels pictures of honest users. It is no protection: resizing, turning or cropping off the 8-pixel grid
removes it, and so does anyone who reads this file.
"""

import hashlib
import io
import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn, idctn

from medviz.errors import InputError

JPEG_QUALITY = 75  # of the compression that the mark is made to survive
THRESHOLD = 6.0  # standard deviations: an unmarked picture exceeds it with a probability of 1e-9
TARGET = 9.0  # the score after compression that embedding aims at
STRENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # orthonormal DCT units; JPEG's steps at quality 75 are 5 to 8 here
MIN_SIDE_PX = 128  # fewer blocks cannot carry the mark
_BLOCK_PX = 8
_COEFFICIENTS = tuple((row, column) for row in range(4) for column in range(4) if row + column in (2, 3))
_TILE_BLOCKS = 128  # the sequence repeats after so many blocks
_CLIP = 4.0  # a coefficient larger than this says no more than this
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601, as in JPEG
_KEY = b"medviz watermark 1"


def embed(image: Image.Image) -> Image.Image:
    """Return a marked RGB copy, by the least of STRENGTHS at which the mark reads TARGET after JPEG compression.

    Every colour channel changes alike, so hue stays. Where no strength reaches TARGET (a picture of one flat black or
    white) the greatest is used. Raises InputError for a side under MIN_SIDE_PX.
    """
    pixels = _pixels(image)
    rows, columns = pixels.shape[0] // _BLOCK_PX, pixels.shape[1] // _BLOCK_PX
    spectrum = np.zeros((rows, _BLOCK_PX, columns, _BLOCK_PX), np.float32)
    for (row, column), signs in zip(_COEFFICIENTS, _signs(rows, columns), strict=True):
        spectrum[:, row, :, column] = signs
    mark = np.zeros(pixels.shape[:2], np.float32)
    mark[: rows * _BLOCK_PX, : columns * _BLOCK_PX] = idctn(spectrum, axes=(1, 3), norm="ortho").reshape(
        rows * _BLOCK_PX, columns * _BLOCK_PX
    )
    for strength in STRENGTHS:
        levels = np.rint(pixels + strength * mark[..., None]).clip(0, 255)
        marked = Image.fromarray(levels.astype(np.uint8))
        if score(compressed(marked)) >= TARGET:
            break
    return marked


def score(image: Image.Image) -> float:
    """Return how strongly the mark is seen, in standard deviations of what a picture without it shows (mean 0)."""
    luma = _pixels(image) @ _LUMA
    rows, columns = luma.shape[0] // _BLOCK_PX, luma.shape[1] // _BLOCK_PX
    blocks = luma[: rows * _BLOCK_PX, : columns * _BLOCK_PX].reshape(rows, _BLOCK_PX, columns, _BLOCK_PX)
    spectrum = dctn(blocks, axes=(1, 3), norm="ortho")
    found = np.stack([spectrum[:, row, :, column] for row, column in _COEFFICIENTS]).clip(-_CLIP, _CLIP)
    energy = float((found**2).sum())
    return float((found * _signs(rows, columns)).sum()) / math.sqrt(energy) if energy > 0 else 0.0


def is_marked(image: Image.Image) -> bool:
    """Whether a picture carries the mark: its score is THRESHOLD or more. Raises InputError as `embed`."""
    return score(image) >= THRESHOLD


def compressed(image: Image.Image, quality: int = JPEG_QUALITY) -> Image.Image:
    """Return the picture as a JPEG file of this quality shows it, with the usual halved colour resolution."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as shown:
        return shown.convert("RGB")


def _pixels(image: Image.Image) -> NDArray[np.float32]:
    if min(image.size) < MIN_SIDE_PX:
        raise InputError(
            f"a watermark needs sides of at least {MIN_SIDE_PX} pixels, got {image.width} x {image.height}"
        )
    return np.asarray(image.convert("RGB"), np.float32)


def _signs(rows: int, columns: int) -> NDArray[np.float32]:
    """The sequence on a grid of blocks: +1 or -1, float32 (coefficients, rows, columns)."""
    tile = _tile()
    return tile[:, np.arange(rows)[:, None] % _TILE_BLOCKS, np.arange(columns) % _TILE_BLOCKS]


@cache
def _tile() -> NDArray[np.float32]:
    # From a hash, because a generator of random numbers may change between versions of its library.
    shape = (len(_COEFFICIENTS), _TILE_BLOCKS, _TILE_BLOCKS)
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(_KEY).digest(math.prod(shape) // 8), np.uint8))
    return bits.astype(np.float32).reshape(shape) * 2.0 - 1.0
