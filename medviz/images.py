"""From untrusted image files to RGB, from RGB to tensors in [-1, 1], and back to PNG."""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from medviz.dicom import decode_dicom, is_dicom
from medviz.errors import InputError, ModelError
from medviz.limits import check_image_size, check_upload_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_ALLOWED = "a PNG, JPEG, WebP, BMP, TIFF or DICOM file"

# Everything that Pillow's parsers are known to raise on hostile files. Its own bomb checks come on top of ours.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_GREY_BITS = (8, 10, 12, 14, 16)  # the depths that detectors and viewers store in a 16-bit file


def decode_image(source: bytes | Path | Image.Image) -> Image.Image:
    """Decode an untrusted image to 8-bit RGB.

    The file's size and the number of pixels in its header are checked before any pixel is decoded. The orientation of
    the EXIF header is applied, transparency is laid on white, and of an animation or a stack the first frame is taken.
    Grey values deeper than 8 bits are scaled from the smallest of 8, 10, 12, 14 or 16 bits that holds the brightest
    one, so that 12-bit radiographs in 16-bit files do not come out black; 32-bit and float values from their own range.
    A DICOM file is shown as medviz.dicom reads it.

    Raises InputError for anything that is not a readable image within the limits of medviz.limits, or that shows one
    single colour.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    content = _read(source)
    with decode_dicom(content) if is_dicom(content) else _open(content) as image:
        return _to_rgb(image)


def fit_square(image: Image.Image, size_px: int) -> Image.Image:
    """Cut the largest centred square and resize it to (size_px, size_px); nothing is stretched or padded."""
    return ImageOps.fit(image, (size_px, size_px), method=Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image, size_px: int | None = None) -> torch.Tensor:
    """Return float32 (3, H, W) in [-1, 1]; with size_px the image is first cut and resized by fit_square."""
    rgb = image.convert("RGB")
    if size_px is not None:
        rgb = fit_square(rgb, size_px)
    pixels = np.array(rgb, dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().div_(127.5).sub_(1.0)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """Return the PIL RGB image of a tensor (3, H, W) in [-1, 1]; values outside are clipped.

    Raises InputError for another shape and ModelError for values that are not finite: a model made them.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise InputError(f"an image tensor must have the shape (3, H, W), got {tuple(pixels.shape)}")
    values = pixels.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ModelError("the model drew an image with values that are not finite; its weights or precision are broken")
    levels = values.clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def png_bytes(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """Encode to PNG with text entries (keyword of 1 to 79 Latin-1 characters -> any text). Same input, same bytes."""
    entries = PngInfo()
    for keyword, value in (text or {}).items():
        if not 1 <= len(keyword) <= 79 or not keyword.isascii():
            raise InputError(f"a PNG keyword has 1 to 79 ASCII characters, got {keyword!r}")
        if value.isascii():
            entries.add_text(keyword, value)
        else:
            entries.add_itxt(keyword, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=entries)
    return buffer.getvalue()


def _read(source: bytes | Path) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_upload_bytes(len(source))
        return bytes(source)
    if not isinstance(source, Path):
        raise InputError(f"an image must be {_ALLOWED}, got {type(source).__name__}")
    try:
        check_upload_bytes(source.stat().st_size)
        return source.read_bytes()
    except OSError as error:
        raise InputError(f"the image file {source.name} cannot be read: {error.strerror}") from error


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"the image has too many pixels: {error}") from error
    except _DECODE_ERRORS as error:
        raise InputError(f"this is not a readable image; allowed is {_ALLOWED}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    check_image_size(*image.size)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        rgb = _flatten(upright)
        extrema = [band.getextrema() for band in rgb.split()]
    except InputError:
        raise
    except _DECODE_ERRORS as error:
        raise InputError(f"the image is damaged or incomplete; allowed is {_ALLOWED}") from error
    if all(low == high for low, high in extrema):
        raise InputError("the image shows one single colour; nothing can be seen on it")
    return rgb


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_8_bit(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError("the image holds values that are not numbers")
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high < 2 ** _GREY_BITS[-1]:
        low = 0.0
        high = next(2.0**bits - 1 for bits in _GREY_BITS if high < 2**bits)
    span = high - low
    if span <= 0:
        raise InputError("the image shows one single colour; nothing can be seen on it")
    return Image.fromarray(np.rint((values - low) / span * 255.0).astype(np.uint8))
