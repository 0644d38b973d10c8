"""From untrusted image files to RGB, from RGB to tensors in [-1, 1], and back to PNG."""

import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT

from medviz.dicom import decode_dicom, is_dicom
from medviz.errors import InputError, ModelError
from medviz.image_files import ReducedFile, exif_orientation, reduced, with_jpeg_end
from medviz.limits import check_image_size, check_upload_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_ALLOWED = "a PNG, JPEG, WebP, BMP, TIFF or DICOM file"

# Everything that Pillow's and OpenCV's decoders raise on hostile files. Their own limits come on top of ours.
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
    cv2.error,
    ImageCms.PyCMSError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_GREY_BITS = (8, 10, 12, 14, 16)  # the depths that detectors and viewers store in a 16-bit file
_SATURATED_SHARE = 0.01  # of the pixels: markers and hot pixels say nothing of the depth
# From the EXIF orientation to what undoes it.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SRGB = ImageCms.createProfile("sRGB")


def decode_image(source: bytes | str | Path | Image.Image) -> Image.Image:
    """Decode an untrusted image to 8-bit sRGB.

    The file's size and the number of pixels in its header are checked before any pixel is decoded. The orientation of
    the EXIF header is applied, transparency is laid on white, and of an animation or a stack the first frame is taken.
    Colours are converted from the embedded ICC profile. Values deeper than 8 bits are scaled from the smallest of 8,
    10, 12, 14 or 16 bits that holds 99 % of them, so that 12-bit radiographs in 16-bit files do not come out black;
    32-bit and float values from their own range. A DICOM file is shown as medviz.dicom reads it.

    source: a file's content, its path, or an image that was decoded already.
    What was read differently than the file asks for is warned of and listed in `info["warnings"]` of the result.

    Raises InputError for anything that is not a readable image within the limits of medviz.limits, or that shows one
    single colour.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(source))
    content = _read(source)
    if is_dicom(content):
        return _to_rgb(decode_dicom(content))
    file = reduced(content)
    with _open(file.content) as image:
        check_image_size(*image.size)
        mended = with_jpeg_end(file.content) if image.format == "JPEG" else None
        if mended is not None:
            with _open(mended) as complete:
                return _finished(_to_rgb(complete), image, file)
        return _finished(_to_rgb(_deep_colour(image, file.content) or image), image, file)


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


def _read(source: bytes | str | Path) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_upload_bytes(len(source))
        return bytes(source)
    path = Path(source) if isinstance(source, str) else source
    if not isinstance(path, Path):
        raise InputError(f"an image must be {_ALLOWED}, got {type(source).__name__}")
    try:
        size_bytes = path.stat().st_size
        check_upload_bytes(size_bytes)
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the image file {path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError("the image file's name holds a NUL character") from error


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
        rgb = _flatten(_opaque(image))
        extrema = [band.getextrema() for band in rgb.split()]
    except InputError:
        raise
    except _DECODE_ERRORS as error:
        raise InputError(f"the image is damaged or incomplete; allowed is {_ALLOWED}") from error
    if all(low == high for low, high in extrema):
        raise InputError("the image shows one single colour; nothing can be seen on it")
    told = image.info.get("warnings", ())
    rgb.info = {"warnings": told} if told else {}
    for warning in told:
        warnings.warn(warning, stacklevel=3)
    return rgb


def _finished(rgb: Image.Image, image: Image.Image, file: ReducedFile) -> Image.Image:
    """`rgb` as the headers of its file say that it is to be turned, mirrored and inverted."""
    orientation = file.orientation if image.format != "WEBP" else exif_orientation(image.info.get("exif", b""))
    if orientation in _TRANSPOSE:
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    return ImageOps.invert(rgb) if file.inverted else rgb


def _opaque(image: Image.Image) -> Image.Image:
    """A 32-bit BMP image without its alpha where that is 0 everywhere: the format says that the byte is unused."""
    if image.mode == "RGBA" and image.format in ("BMP", "DIB") and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")
    return image


def _flatten(image: Image.Image) -> Image.Image:
    """8-bit sRGB of an image in any mode, transparency laid on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or _is_signed_8_bit(image):
        return _to_srgb(_grey_to_8_bit(image), image.info.get("icc_profile")).convert("RGB")
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    image = _to_srgb(image, image.info.get("icc_profile"))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image with its colours converted from an ICC profile; as it is where that is unusable or says sRGB."""
    if not profile or image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        return image
    target = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, image.mode, target)
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if converted is None:
        return image
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    elif image.mode == "CMYK":
        return converted
    plain = np.asarray(image.convert(target), np.int16)
    if np.abs(np.asarray(converted, np.int16) - plain).max() <= 1:  # rounding: the profile is sRGB's
        return image
    converted.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return converted


def _deep_colour(image: Image.Image, content: bytes) -> Image.Image | None:
    """An 8-bit image made of all 16 bits of a colour or grey-and-alpha file, of which Pillow reads the high byte.

    None where the file is not of that kind. The image has the profile and orientation of `image`.
    """
    if not _has_16_bit_bands(image, content):
        return None
    try:
        values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        values = None
    if (
        values is None
        or values.dtype != np.uint16
        or values.ndim != 3
        or (values.shape[1], values.shape[0]) != image.size
    ):
        raise InputError("the image's 16-bit colour is damaged or cannot be read; save it with 8 bits")
    bands = values[..., [2, 1, 0, *range(3, values.shape[2])]]
    levels = _scaled(bands[..., :3], 0.0, _depth(bands[..., :3]))
    if bands.shape[2] == 4:
        levels = np.dstack([levels, np.rint(bands[..., 3] / 257.0).astype(np.uint8)])
    deep = Image.fromarray(levels)
    deep.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    if image.format == "TIFF":  # of other files the orientation is applied later
        deep = deep.transpose(_TRANSPOSE[orientation]) if (orientation := _tag(image, 274)) in _TRANSPOSE else deep
    return deep


def _has_16_bit_bands(image: Image.Image, content: bytes) -> bool:
    if image.format == "PNG":
        depth, colour = content[24:26]
        return depth == 16 and colour != 0  # grey without alpha is read whole
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITSPERSAMPLE, ())  # type: ignore[attr-defined]
        return len(bits) > 1 and max(bits) > 8
    return False


def _tag(image: Image.Image, tag: int) -> Any:
    """The first value of a TIFF tag, None elsewhere."""
    value = image.tag_v2.get(tag) if hasattr(image, "tag_v2") else None
    return value[0] if isinstance(value, tuple) and value else value


def _is_signed_8_bit(image: Image.Image) -> bool:
    return image.mode == "L" and _tag(image, SAMPLEFORMAT) == 2 and _tag(image, BITSPERSAMPLE) == 8


def _grey_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if _is_signed_8_bit(image):
        values = values.view(np.int8)
    elif image.mode == "I" and _tag(image, BITSPERSAMPLE) == 32 and _tag(image, SAMPLEFORMAT) in (None, 1):
        values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise InputError("the image holds values that are not numbers")
    low, high = float(values.min()), float(values.max())
    if values.dtype not in (np.int8, np.float32) and low >= 0 and high < 2 ** _GREY_BITS[-1]:
        low, high = 0.0, _depth(values)
    if high <= low:
        raise InputError("the image shows one single colour; nothing can be seen on it")
    return Image.fromarray(_scaled(values, low, high))


def _depth(values: NDArray[Any]) -> float:
    """Full scale of the smallest usual depth that holds all values but a few saturated ones."""
    counts = np.bincount(values.ravel(), minlength=2**16)
    highest = int(np.searchsorted(counts.cumsum(), (1.0 - _SATURATED_SHARE) * values.size))
    return next(2.0**bits - 1 for bits in _GREY_BITS if highest < 2**bits)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Levels 0 to 255 of values from `low` to `high`; values outside are clipped."""
    if values.dtype == np.uint16:  # every value is computed once, not every pixel
        return _scaled(np.arange(2**16, dtype=np.float64), low, high)[values]
    return np.rint((values.astype(np.float64) - low) / (high - low) * 255.0).clip(0, 255).astype(np.uint8)
