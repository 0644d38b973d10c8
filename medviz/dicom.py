"""From an untrusted DICOM file to 8-bit pixels, shown as the file says that they are to be shown.

One projection radiograph or photograph, never a slice or a sequence. Of the header only the elements in _KEYWORDS are
read: who the patient is reaches no message, log or result. Pixels that are not square are left as they are stored.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medviz.errors import InputError
from medviz.limits import check_image_size

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# What pydicom and Pillow raise on hostile files.
_DECODE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_RADIOGRAPHS = ("CR", "DX", "DR", "RG")  # DR is in no standard, but vendors write it
_PHOTOGRAPHS = ("XC", "DMS")  # external camera, dermoscope
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_GREY_BITS = (8, 16)  # fewest and most bits stored
_UNSEEN_SHARE = 0.005  # of the pixels at either end, where a file of more than 8 bits names no window

# What Pillow and numpy decode, and whose size is known before it is decoded: RLE and deflate announce none.
_COMPRESSED = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_SYNTAX_NAMES = "uncompressed, JPEG Baseline or JPEG 2000"

_TEXT_VRS = ("CS", "DS", "IS")  # padded with blanks
_PIXELS = 0x7FE00010
_PADDING_LIMIT = "PixelPaddingRangeLimit"
_KEYWORDS = (
    "Modality",
    "NumberOfFrames",
    "PatientOrientation",  # how the picture lies, in spite of its name
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ModalityLUTSequence",
    "RescaleIntercept",
    "RescaleSlope",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PixelData",
)
_MAX_HEADER_BYTES = 2**20  # read before the pixels; what is skipped (overlays, private elements) does not count
_MIN_READ_BYTES = 64  # what a shorter read counts as: an empty element takes as long to parse


def is_dicom(content: bytes) -> bool:
    """Tell a DICOM file by its prefix; files of before 1993, which have none, are not recognised."""
    return content[128:132] == b"DICM"


def decode_dicom(content: bytes) -> Image.Image:
    """Decode a radiograph (CR, DX, RG) or photograph (XC, DMS) to an 8-bit image, grey "L" or "RGB".

    Grey values of 8 to 16 bits pass the modality and VOI lookup tables or the first usable window of the file; without
    a window 8-bit values stay as they are, and deeper ones are stretched between their 0.5th and 99.5th percentile.
    Padding pixels take no part in that and are black. MONOCHROME1 is inverted. Where PatientOrientation says so, the
    image is turned and flipped until the patient's right is on the image's left and the head above. An element that is
    present but empty counts as absent, as de-identifiers leave it. Windows that cannot be used are named in
    `info["warnings"]` of the result, a tuple of sentences.

    Raises InputError before a pixel is decoded for another modality, for more than one frame, for sizes outside of
    medviz.limits and for compression that is not supported; and for whatever is damaged or incomplete.
    """
    try:
        dataset = _read(content)
        _check_kind(dataset)
        _check_pixels(dataset)
        pixels, told = _displayed(dataset)
        image = Image.fromarray(_upright(pixels, dataset.get("PatientOrientation")))
        if told:
            image.info["warnings"] = told
        return image
    except InputError:
        raise
    except _DECODE_ERRORS as error:
        raise InputError(
            "the DICOM file is damaged, incomplete or breaks the standard; export it again from its source"
        ) from error


class _Bounded(io.BytesIO):
    """A file of whose header a bounded number of bytes is read: parsing millions of elements would take minutes."""

    left_bytes: float = _MAX_HEADER_BYTES

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.left_bytes -= max(len(content), _MIN_READ_BYTES)
        if self.left_bytes < 0:
            raise InputError(f"the DICOM file's header is too long; {_MAX_HEADER_BYTES // 2**20} MiB are read at most")
        return content

    def ends_at(self, tag: int, vr: str | None, length: int) -> bool:
        """Lift the bound for the pixels, and end reading behind them."""
        if tag == _PIXELS:
            self.left_bytes = math.inf
        return tag > _PIXELS


def _read(content: bytes) -> Dataset:
    """The elements of _KEYWORDS. The transfer syntax is judged first: a deflated header has no size known before."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset

    stream = _Bounded(content)
    stream.seek(132)
    meta = FileMetaDataset(read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2))
    syntax = meta.get("TransferSyntaxUID")
    if syntax not in (*_UNCOMPRESSED, *_COMPRESSED):
        found = "unknown" if syntax is None else str(syntax.name)[:80]
        raise InputError(f"the DICOM file's compression ({found}) cannot be read; export it {_SYNTAX_NAMES}")
    wanted = [tag_for_keyword(keyword) for keyword in _KEYWORDS]
    dataset = read_dataset(
        stream, syntax.is_implicit_VR, syntax.is_little_endian, stop_when=stream.ends_at, specific_tags=wanted
    )
    dataset.file_meta = meta
    for tag in list(dataset.keys()):
        value = dataset.get_item(tag).value  # not parsed: a damaged element may be one that is never needed
        if isinstance(value, bytes) and dictionary_VR(tag) in _TEXT_VRS:
            value = value.strip(b" ")
        if not value:
            del dataset[tag]
    return dataset


def _set_defaults(dataset: Dataset) -> None:
    """Fill in the elements that encoders leave out although the standard asks for them."""
    from pydicom.filewriter import correct_ambiguous_vr

    grey = dataset.PhotometricInterpretation in _GREY
    for keyword, value in (
        ("SamplesPerPixel", 1 if grey else 3),
        ("PixelRepresentation", 0),
        ("BitsStored", dataset.get("BitsAllocated")),
    ):
        if keyword not in dataset:
            setattr(dataset, keyword, value)
    if not grey and "PlanarConfiguration" not in dataset:
        dataset.PlanarConfiguration = 0
    if "HighBit" not in dataset:
        dataset.HighBit = int(dataset.BitsStored) - 1
    # Whether these values are signed depends on PixelRepresentation, which was not known when they were parsed.
    correct_ambiguous_vr(dataset, bool(dataset.file_meta.TransferSyntaxUID.is_little_endian))


def _check_kind(dataset: Dataset) -> None:
    modality = str(dataset.get("Modality") or "")
    if modality not in (*_RADIOGRAPHS, *_PHOTOGRAPHS):
        found = f"has the modality {modality[:16]!r}" if modality else "is incomplete or names no modality"
        raise InputError(
            f"the DICOM file {found}; allowed are plain radiographs ({', '.join(_RADIOGRAPHS)}) "
            f"and photographs ({', '.join(_PHOTOGRAPHS)})"
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise InputError(f"the DICOM file holds {frames} frames; allowed is a single image")
    if "PixelData" not in dataset:
        raise InputError("the DICOM file is incomplete or holds no pixel data; export it again with its image")


def _check_pixels(dataset: Dataset) -> None:
    """Refuse what is too large or stored in an unknown way, from the headers alone."""
    check_image_size(int(dataset.Columns), int(dataset.Rows))
    photometric = str(dataset.PhotometricInterpretation)
    if photometric not in (*_GREY, *_COLOUR):
        raise InputError(
            f"the DICOM file's photometric interpretation is {photometric[:16]!r}; "
            f"allowed: {', '.join((*_GREY, *_COLOUR))}"
        )
    _set_defaults(dataset)
    bits, fewest, most = int(dataset.BitsStored), *(_GREY_BITS if photometric in _GREY else (8, 8))
    if not fewest <= bits <= most:
        allowed = f"{fewest} to {most}" if fewest < most else f"{most}"
        raise InputError(f"the DICOM file stores {bits} bits for each {photometric} sample; allowed: {allowed}")
    if int(dataset.get("HighBit", bits - 1)) != bits - 1:
        raise InputError(
            f"the DICOM file's highest bit is {dataset.HighBit}; with {bits} bits stored it must be {bits - 1}"
        )
    if dataset.file_meta.TransferSyntaxUID in _COMPRESSED:
        _check_frame(dataset)


def _check_frame(dataset: Dataset) -> None:
    """The compressed picture has a size of its own, which decides how much memory decoding takes."""
    from pydicom.encaps import get_frame

    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as picture:
        width_px, height_px = picture.size
    if (width_px, height_px) != (dataset.Columns, dataset.Rows):
        raise InputError(
            f"the DICOM file promises {dataset.Columns} x {dataset.Rows} pixels, "
            f"but its compressed image has {width_px} x {height_px}"
        )


def _displayed(dataset: Dataset) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Pixels (H, W) or (H, W, 3) as they are shown, before they are turned; and what could not be applied."""
    from pydicom.pixels import apply_modality_lut, pixel_array

    stored = pixel_array(dataset, index=0)
    if dataset.PhotometricInterpretation in _COLOUR:
        return stored.astype(np.uint8), ()
    # Every value that can be stored is looked up once, not every pixel: there are a hundred times as many of those.
    count = 2**dataset.BitsStored
    lowest = -count // 2 if dataset.PixelRepresentation else 0
    places = np.clip(stored.astype(np.int32) - lowest, 0, count - 1)
    pixels = np.bincount(places.ravel(), minlength=count)
    padding = _padding(dataset, lowest, count)
    if pixels[~padding].any():
        pixels[padding] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        values = apply_modality_lut(np.arange(lowest, lowest + count, dtype=np.int32), dataset)
        levels, told = _levels(values, pixels, dataset)
    if not np.isfinite(levels).all():
        raise InputError("the DICOM file's rescale or lookup table values are no finite numbers")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        levels = 255.0 - levels
    levels[padding] = 0.0
    return np.rint(levels).clip(0, 255).astype(np.uint8).take(places), told


def _padding(dataset: Dataset, lowest: int, count: int) -> NDArray[np.bool_]:
    """Which of the values from `lowest` on, `count` of them, pad the image (PS3.3 C.7.5.1.1.2)."""
    padding = np.zeros(count, bool)
    if "PixelPaddingValue" not in dataset:
        return padding
    ends = [int(dataset.get(keyword, dataset.PixelPaddingValue)) for keyword in ("PixelPaddingValue", _PADDING_LIMIT)]
    if lowest < 0:  # some encoders write a signed value as if it were unsigned
        ends = [end - 2**16 if end >= 2**15 else end for end in ends]
    first, last = (end - lowest for end in sorted(ends))
    padding[max(first, 0) : max(last + 1, 0)] = True
    return padding


def _levels(
    values: NDArray[Any], pixels: NDArray[np.int64], dataset: Dataset
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Brightness 0 to 255 of `values`, which passed the modality lookup table, and what could not be applied.

    pixels: how many pixels of the image have each value, padding left out.
    """
    table = next(
        (item for item in dataset.get("VOILUTSequence", ()) if {"LUTDescriptor", "LUTData"} <= set(item.dir())), None
    )
    if table is not None:
        return _looked_up(values, table, dataset), ()
    told: list[str] = []
    for centre, width in _windows(dataset):
        levels = _windowed(values, centre, width, dataset)
        if levels is not None and np.ptp(np.rint(levels[pixels > 0])) > 0:
            return levels, tuple(told)
        why = "hits no pixel" if levels is not None else "has no width"
        if np.ptp(values[pixels > 0]) > 0:
            told.append(f"The file's window (centre {centre}, width {width}) {why}; the image is stretched instead.")
    low, high = values[0], values[-1]
    if dataset.BitsStored > 8:
        ranks = pixels.cumsum() / pixels.sum()
        low, high = values[np.searchsorted(ranks, (_UNSEEN_SHARE, 1.0 - _UNSEEN_SHARE))]
        if low == high:  # nearly all pixels are alike, but perhaps not all
            low, high = values[pixels > 0][[0, -1]]
    return np.interp(values, sorted((float(low), float(high))), (0.0, 255.0)), tuple(told)


def _windows(dataset: Dataset) -> list[tuple[str, str]]:
    """Centre and width of each window, as written."""
    both = (dataset.get(keyword) for keyword in ("WindowCenter", "WindowWidth"))
    centres, widths = ((found,) if isinstance(found, (str, float)) else tuple(found or ()) for found in both)
    return [(str(centre), str(width)) for centre, width in zip(centres, widths, strict=False)]


def _windowed(values: NDArray[Any], centre: str, width: str, dataset: Dataset) -> NDArray[np.float64] | None:
    """Brightness 0 to 255 through one window, None where its numbers say nothing."""
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_windowing

    if not (math.isfinite(float(centre)) and math.isfinite(float(width)) and float(width) > 0):
        return None
    window = Dataset()  # of an 8-bit image, so that the window ends at 0 and 255
    window.PhotometricInterpretation, window.BitsStored, window.PixelRepresentation = "MONOCHROME2", 8, 0
    window.WindowCenter, window.WindowWidth = centre, width
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    # LINEAR subtracts 1 from the width, which rescaled values of a range below 1 do not survive.
    window.VOILUTFunction = "LINEAR_EXACT" if function.upper() == "LINEAR" and float(width) < 1 else function
    return apply_windowing(values, window)


def _looked_up(values: NDArray[Any], table: Dataset, dataset: Dataset) -> NDArray[np.float64]:
    """Brightness 0 to 255 of values in a VOI lookup table (PS3.3 C.11.2.1.1)."""
    count, first, described_bits = (int(number) for number in table.LUTDescriptor)
    data, count = table.LUTData, count or 2**16
    if isinstance(data, bytes):
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * count else f"{order}u2")
    entries = np.asarray(data, np.int64)[:count]
    used_bits = int(entries.max()).bit_length()
    # Some encoders name the size of a word. An entry of the named depth reaches at least half of it.
    bits = described_bits if described_bits - 1 <= used_bits <= described_bits else max(used_bits, 1)
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, len(entries) - 1)
    return entries[places] / (2.0**bits - 1.0) * 255.0


def _upright(pixels: NDArray[np.uint8], orientation: Any) -> NDArray[np.uint8]:
    """Turn and flip until rows run to the patient's left and columns to the feet.

    orientation: where rows and columns run to, each by its main axis first (L, R, A, P, H or F); None leaves the image
    as it is, and so does the front-back axis of a side view, which no side can be confused on.
    """
    if orientation is None or isinstance(orientation, str) or len(orientation) != 2:
        return pixels
    row, column = (str(direction)[:1] for direction in orientation)
    if row in ("H", "F") and column in ("L", "R", "A", "P"):
        pixels, row, column = pixels.swapaxes(0, 1), column, row
    if row == "R":
        pixels = pixels[:, ::-1]
    if column == "H":
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
