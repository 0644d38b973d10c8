"""Checks and repairs of untrusted PNG, JPEG and TIFF files before Pillow parses them.

Pillow reads every chunk or segment of a file in Python, so a file of millions of empty ones would hold a core for
minutes. It also refuses a whole picture because of a text chunk that nobody wants to see.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from medviz.errors import InputError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
MAX_PARTS = 50_000  # chunks of a PNG file, segments of a JPEG file: 32 MiB in the usual 8 KiB chunks are 4,096
MAX_JPEG_SCANS = 64  # progressive files have about ten; every scan passes over the whole picture
MAX_ICC_BYTES = 2**20

# Chunks that decide how the first frame looks. Text, time, animation and unknown chunks are left out.
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
# Markers without a length field: padding, restart markers, start and end of the image.
_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xDA)))
_START_OF_SCAN = 0xDA


def without_ancillary_chunks(content: bytes) -> bytes:
    """The PNG file without text, time and other chunks that do not change the picture.

    A colour profile of up to MAX_ICC_BYTES is kept. A file that ends early is kept to its end, for the decoder to
    judge. Raises InputError for more than MAX_PARTS chunks.
    """
    kept, position = [content[:8]], 8
    for _ in range(MAX_PARTS):
        if position + 8 > len(content):
            return b"".join(kept)
        (length,) = struct.unpack_from(">I", content, position)
        kind, end = content[position + 4 : position + 8], position + 12 + length
        if kind in _PNG_CHUNKS or (kind == b"iCCP" and _profile_is_small(content[position + 8 : end - 4])):
            kept.append(content[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end
    raise InputError(f"the PNG file has more than {MAX_PARTS:,} chunks; save the picture again from its source")


def _profile_is_small(chunk: bytes) -> bool:
    """Whether an iCCP chunk (name, NUL, method, zlib stream) unpacks to at most MAX_ICC_BYTES."""
    packed = chunk[chunk.find(b"\0") + 2 :]
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, MAX_ICC_BYTES)
    except zlib.error:
        return False
    return unpacker.eof


def check_jpeg_segments(content: bytes) -> None:
    """Raise InputError for more than MAX_PARTS segments before the first scan, or more than MAX_JPEG_SCANS scans."""
    position, parts = 2, 0
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == _START_OF_SCAN:
            break
        bare = marker in _BARE_MARKERS or marker == 0xFF
        position += (1 if marker == 0xFF else 2) if bare else 2 + struct.unpack_from(">H", content, position + 2)[0]
        parts += 1
        if parts > MAX_PARTS:
            raise InputError(f"the JPEG file has more than {MAX_PARTS:,} segments; save it again from its source")
    scans = content.count(b"\xff\xda", position)  # in compressed data a 0xFF byte is followed by 0 or a restart marker
    if scans > MAX_JPEG_SCANS:
        raise InputError(f"the JPEG file has {scans} scans; at most {MAX_JPEG_SCANS} are read")


def as_black_is_zero(content: bytes) -> bytes | None:
    """A MinIsWhite TIFF file relabelled as MinIsBlack, whose pixels are then to be inverted; None for other files.

    Pillow inverts 8 bits of such a file, leaves 16 as they are and refuses 32.
    """
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None or len(content) < 16:
        return None
    version = struct.unpack_from(f"{order}H", content, 2)[0]
    if version == 42:
        (start,), count, entry_bytes = struct.unpack_from(f"{order}I", content, 4), "H", 12
    elif version == 43:  # BigTIFF
        (start,), count, entry_bytes = struct.unpack_from(f"{order}Q", content, 8), "Q", 20
    else:
        return None
    try:
        (entries,) = struct.unpack_from(f"{order}{count}", content, start)
        first = start + struct.calcsize(f"{order}{count}")
        for place in range(first, first + entry_bytes * min(entries, MAX_PARTS), entry_bytes):
            tag, kind = struct.unpack_from(f"{order}HH", content, place)
            if tag == PHOTOMETRIC_INTERPRETATION:
                value = place + entry_bytes - (8 if version == 43 else 4)
                form = f"{order}{'H' if kind == 3 else 'I'}"
                if struct.unpack_from(form, content, value)[0] != 0:
                    return None
                return content[:value] + struct.pack(form, 1) + content[value + struct.calcsize(form) :]
    except (struct.error, OverflowError):
        return None
    return None


def with_jpeg_end(content: bytes) -> bytes | None:
    """The JPEG file with the end-of-image marker that it lacks, or None where more than the marker is missing.

    A decoder fills missing data with grey. So the picture is complete exactly when bytes inserted before the marker
    change nothing: a decoder that waits for more data would read them.
    """
    if not content.startswith(JPEG_START) or content.endswith(JPEG_END):
        return None
    body = content.removesuffix(b"\xff")
    plain, padded = (_pixels(body + extra + JPEG_END) for extra in (b"", b"\x5a" * 64))
    if plain is None or padded is None or not np.array_equal(plain, padded):
        return None
    return body + JPEG_END


def _pixels(content: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError):
        return None
