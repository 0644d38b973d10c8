"""Untrusted PNG, JPEG, TIFF and WebP files, reduced to what decides how the first picture looks.

Pillow parses every chunk, segment and tag of a file in Python and keeps what they hold. A file of millions of empty
chunks keeps a core busy for minutes; tags that all name the same megabytes fill the memory of the machine. It also
refuses a whole picture because of a text chunk that nobody wants to see. So everything else is left out before.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medviz.errors import InputError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
MAX_PARTS = 50_000  # chunks of a PNG file, segments of a JPEG file: 32 MiB in the usual 8 KiB chunks are 4,096
MAX_JPEG_SCANS = 64  # progressive files have about ten; every scan passes over the whole picture
MAX_ICC_BYTES = 2**20

_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# JPEG markers without a length field: padding, restart markers, start and end of the image.
_BARE_MARKERS = frozenset((0x01, *range(0xD0, 0xDA)))
_START_OF_SCAN, _EXIF_SEGMENT = 0xDA, 0xE1
# Application segments and comments are left out, but for JFIF, the colour profile and Adobe's colour transform.
_LEFT_OUT_SEGMENTS = frozenset((*range(0xE0, 0xF0), 0xFE)) - {0xE0, 0xE2, 0xEE}
_ORIENTATION, _PHOTOMETRIC = 274, 262
# Width to planar configuration, predictor, colours, tiles, bands, JPEG tables, YCbCr, colour profile.
# fmt: off
_TIFF_TAGS = frozenset((
    256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339, 347,
    530, 531, 532, 34675,
))
# fmt: on
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True)
class ReducedFile:
    """A file that Pillow reads at once.

    orientation: 1 to 8, as EXIF counts them, of a PNG or JPEG file, whose content no longer says it; inverted: whether
    white is 0 in a TIFF file whose content now says that black is.
    """

    content: bytes
    orientation: int = 1
    inverted: bool = False


def reduced(content: bytes) -> ReducedFile:
    """The file without what does not change its first picture; other formats as they are.

    A file that ends early is kept to its end, for the decoder to judge. Raises InputError for more than MAX_PARTS
    parts, more than MAX_JPEG_SCANS scans and TIFF tags that hold more than the file.
    """
    if content.startswith(_PNG_SIGNATURE):
        return _reduced_png(content)
    if content.startswith(_JPEG_START):
        return _reduced_jpeg(content)
    if content[:2] in (b"II", b"MM"):
        return _reduced_tiff(content)
    return ReducedFile(content)


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in an EXIF block; 1 where it has none or is damaged."""
    block = exif.removeprefix(b"Exif\0\0")
    try:
        for tag in _first_directory(block):
            if tag.number == _ORIENTATION:
                value = tag.short(block)
                return value if 1 <= value <= 8 else 1
    except (struct.error, ValueError):
        return 1
    return 1


def with_jpeg_end(content: bytes) -> bytes | None:
    """The JPEG file with the end-of-image marker that it lacks, or None where more than the marker is missing.

    A decoder fills missing data with grey. So the picture is complete exactly when bytes inserted before the marker
    change nothing: a decoder that waits for more data would read them.
    """
    if not content.startswith(_JPEG_START) or content.endswith(_JPEG_END):
        return None
    body = content.removesuffix(b"\xff")
    plain, padded = (_jpeg_pixels(body + extra + _JPEG_END) for extra in (b"", b"\x5a" * 64))
    if plain is None or padded is None or not np.array_equal(plain, padded):
        return None
    return body + _JPEG_END


def _jpeg_pixels(content: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError):
        return None


def _reduced_png(content: bytes) -> ReducedFile:
    kept, position, exif = [content[:8]], 8, b""
    for _ in range(MAX_PARTS):
        if position + 8 > len(content):
            break
        (length,) = struct.unpack_from(">I", content, position)
        kind, end = content[position + 4 : position + 8], position + 12 + length
        if kind in _PNG_CHUNKS or (kind == b"iCCP" and _is_small_profile(content[position + 8 : end - 4])):
            kept.append(content[position:end])
        elif kind == b"eXIf":
            exif = exif or content[position + 8 : end - 4]
        position = end
        if kind == b"IEND":
            break
    else:
        raise InputError(f"the PNG file has more than {MAX_PARTS:,} chunks; save the picture again from its source")
    return ReducedFile(b"".join(kept), exif_orientation(exif))


def _is_small_profile(chunk: bytes) -> bool:
    """Whether an iCCP chunk (name, NUL, method, zlib stream) unpacks to at most MAX_ICC_BYTES."""
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(chunk[chunk.find(b"\0") + 2 :], MAX_ICC_BYTES)
    except zlib.error:
        return False
    return unpacker.eof


def _reduced_jpeg(content: bytes) -> ReducedFile:
    kept, position, exif = [_JPEG_START], 2, b""
    for _ in range(MAX_PARTS):
        if content[position : position + 1] != b"\xff" or position + 4 > len(content):
            break
        marker = content[position + 1]
        if marker == _START_OF_SCAN:
            break
        if marker == 0xFF:  # padding before a marker
            end = position + 1
        elif marker in _BARE_MARKERS:
            end = position + 2
        else:
            end = position + 2 + struct.unpack_from(">H", content, position + 2)[0]
        if marker == _EXIF_SEGMENT and content[position + 4 : position + 10] == b"Exif\0\0":
            exif = exif or content[position + 4 : end]
        if marker not in _LEFT_OUT_SEGMENTS:
            kept.append(content[position:end])
        position = end
    else:
        raise InputError(f"the JPEG file has more than {MAX_PARTS:,} segments; save it again from its source")
    scans = content.count(b"\xff\xda", position)  # in compressed data a 0xFF byte is followed by 0 or a restart marker
    if scans > MAX_JPEG_SCANS:
        raise InputError(f"the JPEG file has {scans} scans; at most {MAX_JPEG_SCANS} are read")
    return ReducedFile(b"".join(kept) + content[position:], exif_orientation(exif))


@dataclass(frozen=True)
class _Tag:
    """One entry of a TIFF directory. data: where its value stands in the file."""

    number: int
    kind: int
    count: int
    data: int
    order: str

    @property
    def size_bytes(self) -> int:
        return self.count * _TIFF_BYTES.get(self.kind, 1)

    def short(self, content: bytes) -> int:
        return int(struct.unpack_from(f"{self.order}{'H' if self.kind == 3 else 'I'}", content, self.data)[0])


def _first_directory(content: bytes) -> Iterator[_Tag]:
    """The tags of a TIFF file's or EXIF block's first directory. Raises ValueError where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        raise ValueError("neither II nor MM")
    (version,) = struct.unpack_from(f"{order}H", content, 2)
    if version not in (42, 43):
        raise ValueError(f"TIFF version {version}")
    word, counts = ("I", "H") if version == 42 else ("Q", "Q")  # 43 is BigTIFF
    word_bytes = struct.calcsize(word)
    (place,) = struct.unpack_from(f"{order}{word}", content, word_bytes if version == 43 else 4)
    (count,) = struct.unpack_from(f"{order}{counts}", content, place)
    place += struct.calcsize(counts)
    for _ in range(min(count, 2**16)):
        number, kind, length = struct.unpack_from(f"{order}HH{word}", content, place)
        inside = place + 4 + word_bytes
        tag = _Tag(number, kind, length, inside, order)
        if tag.size_bytes > word_bytes:
            (outside,) = struct.unpack_from(f"{order}{word}", content, inside)
            tag = _Tag(number, kind, length, outside, order)
        yield tag
        place = inside + word_bytes


def _reduced_tiff(content: bytes) -> ReducedFile:
    """A classic TIFF file with the pixels of `content` behind a directory of _TIFF_TAGS alone, and no second picture.

    MinIsWhite becomes MinIsBlack: Pillow inverts 8 bits of such a file, leaves 16 as they are and refuses 32.
    """
    try:
        tags = {tag.number: tag for tag in _first_directory(content) if tag.number in _TIFF_TAGS}
        inverted = _PHOTOMETRIC in tags and tags[_PHOTOMETRIC].short(content) == 0
        if sum(tag.size_bytes for tag in tags.values()) > len(content):
            raise InputError("the TIFF file's tags hold more than the file; save it again from its source")
        order, entries, values = content[:2].decode(), [], bytearray()
        sign = "<" if order == "II" else ">"
        start = len(content) + len(content) % 2
        first_value = start + 2 + 12 * len(tags) + 4
        for number in sorted(tags):
            tag = tags[number]
            value = content[tag.data : tag.data + tag.size_bytes]
            kind = {16: 4, 18: 4}.get(tag.kind, tag.kind)  # BigTIFF's 64-bit numbers fit into 32 bits
            if kind != tag.kind:
                value = struct.pack(f"{sign}{tag.count}I", *struct.unpack(f"{sign}{tag.count}Q", value))
            if number == _PHOTOMETRIC and inverted:
                value = struct.pack(f"{sign}{'H' if kind == 3 else 'I'}", 1)
            if len(value) <= 4:
                entries.append(struct.pack(f"{sign}HHI", number, kind, tag.count) + value.ljust(4, b"\0"))
                continue
            entries.append(struct.pack(f"{sign}HHII", number, kind, tag.count, first_value + len(values)))
            values += value + bytes(len(value) % 2)
    except (struct.error, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        return ReducedFile(b"")  # Pillow's own message for a file that is none
    header = order.encode() + struct.pack(f"{sign}HI", 42, start)
    directory = struct.pack(f"{sign}H", len(entries)) + b"".join(entries) + bytes(4)
    # The header of BigTIFF is longer: no pixel stands in its first 16 bytes.
    return ReducedFile(header + content[8:].ljust(start - 8, b"\0") + directory + bytes(values), inverted=inverted)
