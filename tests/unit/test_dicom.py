"""DICOM uploads: shown as their headers say, upright, or refused at once; nothing of the patient is ever told."""

import contextlib
import struct
import time
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from medviz.errors import InputError
from medviz.images import decode_image
from tests.dicoms import COLUMNS, ROWS, SECRET, compressed, dicom, lookup_table, ramp


def shown(content: bytes) -> np.ndarray:
    """Grey levels 0 to 255 as they are handed on."""
    return np.asarray(decode_image(content))


def grey(content: bytes) -> np.ndarray:
    pixels = shown(content)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0].astype(int)


WHOLE_WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


@pytest.mark.parametrize("bits", range(8, 17))
def test_every_depth_is_shown_from_black_to_white(bits: int) -> None:
    found = grey(dicom(ramp(bits), BitsStored=bits, WindowCenter=2 ** (bits - 1), WindowWidth=2**bits))
    assert np.abs(found - ramp(bits) / (2**bits - 1) * 255).max() <= 1


def test_eight_bits_without_a_window_come_back_as_they_are() -> None:
    stored = np.random.default_rng(0).integers(10, 200, (ROWS, COLUMNS)).astype(np.uint8)
    assert np.array_equal(grey(dicom(stored)), stored)


def test_monochrome1_is_inverted() -> None:
    plain, inverted = (
        grey(dicom(PhotometricInterpretation=name, **WHOLE_WINDOW)) for name in ("MONOCHROME2", "MONOCHROME1")
    )
    assert np.array_equal(plain, 255 - inverted)
    assert plain[0].mean() < plain[-1].mean()


def test_signed_values_are_read_as_signed() -> None:
    stored = ramp(12, lowest=-2048)
    found = grey(dicom(stored, WindowCenter=0, WindowWidth=4096))
    assert np.array_equal(found, grey(dicom(**WHOLE_WINDOW)))


def test_bits_that_are_not_stored_are_ignored() -> None:
    dirty = ramp() | 0x5000
    assert np.array_equal(grey(dicom(dirty, **WHOLE_WINDOW)), grey(dicom(**WHOLE_WINDOW)))


def test_the_window_decides_what_is_black_and_white() -> None:
    found = grey(dicom(WindowCenter=1000, WindowWidth=500))
    stored = ramp().astype(float)
    assert (found[stored <= 750] == 0).all()
    assert (found[stored >= 1250] == 255).all()
    middle = (stored > 760) & (stored < 1240)
    assert np.abs(found[middle] - (stored[middle] - 750) / 500 * 255).max() <= 2


def test_a_window_that_the_values_do_not_fill_is_not_stretched() -> None:
    stored = ramp(10)  # a quarter of what could be stored
    assert grey(dicom(stored, **WHOLE_WINDOW)).max() == pytest.approx(64, abs=1)


def test_of_several_windows_the_first_is_taken() -> None:
    several = dicom(WindowCenter=[1000, 3000], WindowWidth=[500, 100])
    assert np.array_equal(grey(several), grey(dicom(WindowCenter=1000, WindowWidth=500)))


def test_the_windows_function_may_be_a_sigmoid() -> None:
    found = grey(dicom(WindowCenter=2000, WindowWidth=800, VOILUTFunction="SIGMOID"))
    assert np.abs(found - 255 / (1 + np.exp(-4 * (ramp() - 2000.0) / 800))).max() <= 1


def test_rescaled_values_meet_the_window() -> None:
    rescaled = dicom(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=1000)
    plain = grey(dicom(WindowCenter=1000, WindowWidth=500, VOILUTFunction="LINEAR_EXACT"))
    assert np.abs(grey(rescaled) - plain).max() <= 1


def test_a_falling_rescale_turns_the_image_around() -> None:
    for window in (WHOLE_WINDOW, {}):
        falling = grey(dicom(RescaleSlope=-1, RescaleIntercept=4095, **window))
        assert np.abs(falling - grey(dicom(**window))[::-1, ::-1]).max() <= 1


def test_lookup_tables_are_applied() -> None:
    curve = np.rint(np.sqrt(np.arange(4096) / 4095) * 65535)
    expected = np.sqrt(ramp() / 4095) * 255
    voi = dicom(**lookup_table("VOILUTSequence", curve, 16), **WHOLE_WINDOW)
    assert np.abs(grey(voi) - expected).max() <= 1
    modality = dicom(**lookup_table("ModalityLUTSequence", curve, 16), WindowCenter=32768, WindowWidth=65536)
    assert np.abs(grey(modality) - expected).max() <= 1


def test_a_long_lookup_table_of_eight_bit_values_does_not_wrap_around() -> None:
    curve = np.arange(4096) // 16
    found = grey(dicom(**lookup_table("VOILUTSequence", curve, 8)))
    assert np.array_equal(found, ramp() // 16)


def test_without_a_window_deep_values_are_stretched_and_a_stray_pixel_changes_nothing() -> None:
    narrow = ramp(9) + 1000
    found = grey(dicom(narrow))
    assert (found.min(), found.max()) == (0, 255)
    narrow[0, 0] = 4095
    assert np.abs(grey(dicom(narrow)) - found)[1:].max() <= 3


def test_an_image_that_is_nearly_one_colour_still_shows_what_is_there() -> None:
    stored = np.full((400, 400), 100, np.uint16)
    stored[200:204, 200:204] = 900
    assert sorted(np.unique(grey(dicom(stored)))) == [0, 255]


def test_a_large_radiograph_is_read_in_a_second() -> None:
    content = dicom(ramp(rows=3000, columns=2500), PatientOrientation=["R", "F"], **WHOLE_WINDOW)
    started = time.thread_time()
    assert decode_image(content).size == (2500, 3000)
    assert time.thread_time() - started < 1.0


def arrow() -> np.ndarray:
    """Four quarters of four brightnesses: any turn or flip is seen."""
    quarters = np.array([[10, 80], [150, 220]], np.uint8)
    return np.kron(quarters, np.ones((24, 20), np.uint8))


# How a detector stores the upright arrow under an orientation.
STORED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "L\\F": lambda a: a,
    "R\\F": lambda a: a[:, ::-1],
    "L\\H": lambda a: a[::-1],
    "R\\H": lambda a: a[::-1, ::-1],
    "F\\L": lambda a: a.T,
    "F\\R": lambda a: a[:, ::-1].T,
    "H\\L": lambda a: a[::-1].T,
    "H\\R": lambda a: a[::-1, ::-1].T,
    "LA\\FP": lambda a: a,
    "RPF\\F": lambda a: a[:, ::-1],
    "A\\F": lambda a: a,
    "P\\H": lambda a: a[::-1],
}


@pytest.mark.parametrize("orientation", STORED)
def test_the_patients_right_comes_to_the_images_left_and_the_head_above(orientation: str) -> None:
    content = dicom(np.ascontiguousarray(STORED[orientation](arrow())), PatientOrientation=orientation.split("\\"))
    assert np.array_equal(grey(content), arrow())


@pytest.mark.parametrize("orientation", [None, "", ["", ""], ["L"], ["", "F"]])
def test_without_an_orientation_the_image_stays_as_it_is(orientation: object) -> None:
    assert np.array_equal(grey(dicom(arrow(), PatientOrientation=orientation)), arrow())


def colour() -> np.ndarray:
    rows, columns = np.mgrid[0:64, 0:64]
    return np.stack([rows * 3, columns * 3, rows + columns], -1).astype(np.uint8)


RGB = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Modality": "XC"}


def test_a_photograph_keeps_its_colours() -> None:
    assert np.array_equal(shown(dicom(colour(), **RGB)), colour())
    planes = {**RGB, "PlanarConfiguration": 1, "PixelData": np.moveaxis(colour(), -1, 0).tobytes()}
    assert np.array_equal(shown(dicom(colour(), **planes)), colour())
    luma = np.asarray(Image.fromarray(colour()).convert("YCbCr"))
    found = shown(dicom(luma, **{**RGB, "PhotometricInterpretation": "YBR_FULL", "Modality": "DMS"}))
    assert np.abs(found.astype(int) - colour()).max() <= 3


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
def test_uncompressed_files_are_read_in_either_encoding(syntax: str) -> None:
    assert np.array_equal(grey(dicom(syntax=syntax, **WHOLE_WINDOW)), grey(dicom(**WHOLE_WINDOW)))


def test_jpeg_and_jpeg_2000_are_read() -> None:
    picture = Image.fromarray(arrow())
    baseline = compressed(picture, "JPEG", uid.JPEGBaseline8Bit)
    assert np.abs(grey(baseline) - arrow()).max() <= 8
    assert np.array_equal(grey(compressed(picture, "JPEG2000", uid.JPEG2000Lossless)), arrow())
    deep = compressed(Image.fromarray(ramp(16)), "JPEG2000", uid.JPEG2000Lossless, BitsStored=16)
    assert np.array_equal(grey(deep), grey(dicom(ramp(16), BitsStored=16)))
    photograph = {**RGB, "PhotometricInterpretation": "YBR_FULL_422"}
    found = shown(compressed(Image.fromarray(colour()), "JPEG", uid.JPEGBaseline8Bit, **photograph))
    assert np.abs(found.astype(int) - colour()).mean() <= 3


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        (uid.JPEGLosslessSV1, "JPEG Lossless"),
        (uid.JPEGExtended12Bit, "JPEG Extended"),
        (uid.JPEGLSLossless, "JPEG-LS"),
        (uid.RLELossless, "RLE Lossless"),
        ("1.2.3.4", "1.2.3.4"),
    ],
)
def test_other_compression_is_named_with_what_to_do(syntax: str, name: str) -> None:
    content = compressed(Image.fromarray(arrow()), "JPEG", uid.JPEGBaseline8Bit)
    with pytest.raises(InputError, match=f"{name}.*export it uncompressed, JPEG Baseline or JPEG 2000"):
        decode_image(content.replace(uid.JPEGBaseline8Bit.encode(), syntax.encode().ljust(22, b"\0")))


@pytest.mark.parametrize("modality", ["CT", "MR", "US", "PT", "NM", "MG", "SEG", "", None])
def test_slices_and_other_modalities_are_refused_by_their_name(modality: str | None) -> None:
    with pytest.raises(InputError, match=r"CR, DX, DR, RG.*XC, DMS") as caught:
        decode_image(dicom(Modality=modality))
    assert f"modality {modality!r}" in str(caught.value) if modality else "no modality" in str(caught.value)


def explode(*_: object, **__: object) -> None:
    raise AssertionError("the pixels were decoded")


def frame_that_claims(width: int, height: int) -> bytes:
    """A JPEG in 48 x 40 pixels whose own header promises another size."""
    sides = [struct.pack(">HH", *hw) for hw in ((ROWS, COLUMNS), (height, width))]
    content = compressed(Image.new("L", (COLUMNS, ROWS)), "JPEG", uid.JPEGBaseline8Bit)
    return content.replace(*(b"\xff\xc0\x00\x0b\x08" + side for side in sides))


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "one pixel": (lambda: dicom(ramp(rows=1, columns=1)), "1 x 1 pixels; both sides need at least 32"),
    "huge header": (lambda: dicom(Rows=65535, Columns=65535), "at most 24 million"),
    "several frames": (lambda: dicom(NumberOfFrames=300), "300 frames"),
    "no pixels": (lambda: dicom(PixelData=None), "no pixel data"),
    "palette": (lambda: dicom(PhotometricInterpretation="PALETTE COLOR"), "'PALETTE COLOR'; allowed: MONOCHROME1"),
    "32 bits": (lambda: dicom(ramp(12), BitsAllocated=32, BitsStored=32), "stores 32 bits"),
    "one bit": (lambda: dicom(BitsStored=1), "8 to 16"),
    "left-aligned bits": (lambda: dicom(HighBit=15), "highest bit is 15; with 12 bits stored it must be 11"),
    "deep colour": (lambda: dicom(colour().astype(np.uint16), **{**RGB, "BitsStored": 16}), "16 bits for each RGB"),
    "a bomb in a small frame": (
        lambda: frame_that_claims(9000, 9000),
        "promises 48 x 40 pixels, but its compressed image has 9000 x 9000",
    ),
    "a bomb that Pillow knows": (lambda: frame_that_claims(65000, 65000), "damaged"),
}


@cache
def refused(name: str) -> bytes:
    return REFUSED[name][0]()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_from_its_headers_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydicom.pixels

    content = refused(name)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", explode)
    started = time.thread_time()
    with pytest.raises(InputError, match=REFUSED[name][1]):
        decode_image(content)
    assert time.thread_time() - started < 1.0


def test_a_constant_image_is_refused() -> None:
    flat = np.full((64, 64), 700, np.uint16)
    for content in (dicom(flat), dicom(flat, **WHOLE_WINDOW), dicom(flat, WindowCenter=-9000, WindowWidth=2)):
        with pytest.raises(InputError, match="one single colour"):
            decode_image(content)


def test_rescale_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="no finite numbers"):
        decode_image(dicom(RescaleSlope="inf", RescaleIntercept=0))


@pytest.mark.parametrize(
    ("window", "named"),
    [
        ({"WindowCenter": 100, "WindowWidth": 0}, "centre 100.0, width 0.0"),
        ({"WindowCenter": 100, "WindowWidth": -50}, "width -50.0"),
        ({"WindowCenter": 100, "WindowWidth": "inf"}, "width inf"),
        ({"WindowCenter": -9000, "WindowWidth": 2}, "centre -9000.0"),
        ({"WindowCenter": 90000, "WindowWidth": 200, "VOILUTFunction": "SIGMOID"}, "centre 90000.0"),
    ],
)
def test_a_window_that_shows_nothing_is_named_and_the_image_stretched(window: dict[str, object], named: str) -> None:
    with pytest.warns(UserWarning, match=named):
        image = decode_image(dicom(**window))
    assert np.array_equal(image, decode_image(dicom()))
    assert len(image.info["warnings"]) == 1
    assert named in image.info["warnings"][0]


def test_a_file_without_a_window_of_its_own_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    for content in (dicom(), dicom(**WHOLE_WINDOW), dicom(WindowCenter=1000), dicom(WindowWidth=500)):
        assert "warnings" not in decode_image(content).info
    assert not recwarn.list


def test_after_a_window_that_shows_nothing_the_next_is_taken() -> None:
    with pytest.warns(UserWarning, match="width 0"):
        several = decode_image(dicom(WindowCenter=[100, 1000], WindowWidth=[0, 500]))
    assert np.array_equal(several, decode_image(dicom(WindowCenter=1000, WindowWidth=500)))


def test_a_width_below_one_is_read_without_the_offset_of_whole_numbers() -> None:
    scaled = {"RescaleSlope": str(1 / 4096), "RescaleIntercept": "0", "WindowCenter": "0.5", "WindowWidth": "0.9"}
    plain = dicom(WindowCenter=2048, WindowWidth=0.9 * 4096, VOILUTFunction="LINEAR_EXACT")
    assert np.abs(grey(dicom(**scaled)) - grey(plain)).max() <= 1


EMPTY = {
    "RescaleSlope": "",
    "RescaleIntercept": "",
    "WindowCenter": "",
    "WindowWidth": "",
    "VOILUTFunction": "",
    "NumberOfFrames": "",
    "VOILUTSequence": [],
    "ModalityLUTSequence": [],
    "PixelPaddingValue": "",
    "PatientOrientation": "",
    "HighBit": "",
    "PixelRepresentation": "",
    "SamplesPerPixel": "",
}


@pytest.mark.parametrize("keyword", EMPTY)
@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
def test_an_empty_element_counts_as_absent(keyword: str, syntax: str) -> None:
    window = {} if keyword.startswith("Window") else WHOLE_WINDOW
    assert np.array_equal(grey(dicom(syntax=syntax, **{**window, keyword: EMPTY[keyword]})), grey(dicom(**window)))


@pytest.mark.parametrize("keyword", ["RescaleSlope", "WindowWidth", "VOILUTFunction"])
def test_an_element_of_blanks_counts_as_absent(keyword: str) -> None:
    value = {"RescaleSlope": "1234", "WindowWidth": "4096", "VOILUTFunction": "LINEAR"}[keyword]
    content = dicom(WindowCenter="2048", **{keyword: value})
    place = content.index(value.encode())
    blank = content[:place] + b" " * len(value) + content[place + len(value) :]
    assert np.array_equal(grey(blank), grey(dicom(WindowCenter="2048")))


@pytest.mark.parametrize("keyword", ["PixelRepresentation", "HighBit", "BitsStored", "SamplesPerPixel"])
def test_a_missing_element_with_an_obvious_default_takes_it(keyword: str) -> None:
    stored = ramp(16)
    without = dicom(stored, **{"BitsStored": 16, keyword: None, **({"HighBit": 15} if keyword == "BitsStored" else {})})
    assert np.array_equal(grey(without), grey(dicom(stored, BitsStored=16)))


def test_colour_without_a_planar_configuration_is_read_pixel_by_pixel() -> None:
    for keyword in ("PlanarConfiguration", "SamplesPerPixel", "PixelRepresentation"):
        assert np.array_equal(shown(dicom(colour(), **{**RGB, keyword: None})), colour())


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("described", [8, 16])
def test_a_table_is_scaled_by_the_bits_that_its_entries_use(bits: int, described: int) -> None:
    entries = np.linspace(0, 2**bits - 1, 4096).round()
    found = grey(dicom(**lookup_table("VOILUTSequence", entries, described)))
    assert np.abs(found - ramp() / 4095 * 255).max() <= 1


def test_a_table_that_leaves_the_upper_half_of_its_depth_unused_stays_dark() -> None:
    entries = np.linspace(0, 2**15 - 1, 4096).round()
    assert grey(dicom(**lookup_table("VOILUTSequence", entries, 16))).max() == 127


def padded(value: int, lowest: int = 0) -> np.ndarray:
    """A ramp with padding in its left third."""
    stored = ramp(10, lowest=lowest) + 1000
    stored[:, : COLUMNS // 3] = value
    return stored


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("value", "limit"), [(0, None), (4095, None), (4000, 4095), (4095, 4000)])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 1512, "WindowWidth": 1024}])
def test_padding_takes_no_part_and_is_black(
    syntax: str, photometric: str, value: int, limit: int | None, window: dict[str, int]
) -> None:
    found = grey(
        dicom(
            padded(value),
            syntax,
            PhotometricInterpretation=photometric,
            PixelPaddingValue=value,
            PixelPaddingRangeLimit=limit,
            **window,
        )
    )
    assert (found[:, : COLUMNS // 3] == 0).all()
    anatomy = found[:, COLUMNS // 3 :]
    assert anatomy.min() <= 2
    assert anatomy.max() >= 253
    assert abs(anatomy.mean() - 127.5) < 4


@pytest.mark.parametrize("value", [-2000, 63536])
def test_signed_padding_is_found_also_where_it_is_written_unsigned(value: int) -> None:
    stored = padded(-2000, lowest=-512)
    content = dicom(stored, BitsStored=16, PixelPaddingValue=-2000)
    content = content.replace(b"\x28\x00\x20\x01SS", b"\x28\x00\x20\x01US") if value > 0 else content
    found = grey(content)
    assert (found[:, : COLUMNS // 3] == 0).all()
    assert abs(found[:, COLUMNS // 3 :].mean() - 127.5) < 4


def test_an_image_of_padding_alone_is_shown_as_it_is_stored() -> None:
    flat = np.full((ROWS, COLUMNS), 5, np.uint16)
    with pytest.raises(InputError, match="one single colour"):
        decode_image(dicom(flat, PixelPaddingValue=5))


def deflated_bomb() -> bytes:
    """A header of a gigabyte that takes a megabyte."""
    plain = dicom(syntax=uid.DeflatedExplicitVRLittleEndian, PixelData=None)
    start = plain.index(uid.DeflatedExplicitVRLittleEndian.encode()) + 22
    deflate = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    block = deflate.compress(bytes(2**22)) + deflate.flush(zlib.Z_FULL_FLUSH)  # a block of its own, to be repeated
    return plain[:start] + block * 256 + deflate.flush()


def endless_header(element: bytes) -> bytes:
    content = dicom()
    start = content.index(b"\x08\x00\x16\x00UI")
    return content[:start] + element * (24 * 2**20 // len(element)) + content[start:]


NESTED = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 10**6


@pytest.mark.parametrize(
    "make",
    [
        deflated_bomb,
        lambda: endless_header(b"\x08\x00\x05\x01UI\x00\x00"),
        lambda: endless_header(NESTED),
        lambda: dicom(syntax=uid.ImplicitVRLittleEndian, WindowCenter=None).replace(
            b"\xe0\x7f\x10\x00",
            b"\x28\x00\x50\x10" + (16 * 2**20).to_bytes(4, "little") + b"1\\" * 2**23 + b"\xe0\x7f\x10\x00",
        ),
    ],
    ids=["deflated", "elements", "items", "values"],
)
def test_a_header_that_would_keep_the_parser_busy_is_refused_at_once(make: Callable[[], bytes]) -> None:
    content = make()
    started = time.thread_time()
    with pytest.raises(InputError):
        decode_image(content)
    assert time.thread_time() - started < 1.0


def test_large_elements_that_are_skipped_do_not_count() -> None:
    overlay = Dataset()
    overlay.add_new(0x60003000, "OW", bytes(3 * 2**20))
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, overlay)
    plain = dicom(**WHOLE_WINDOW)
    start = plain.index(b"\xe0\x7f\x10\x00")
    assert np.array_equal(grey(plain[:start] + buffer.getvalue() + plain[start:]), grey(plain))


@cache
def whole(kind: str) -> bytes:
    if kind == "compressed":
        return compressed(Image.fromarray(arrow()), "JPEG2000", uid.JPEG2000Lossless)
    syntax = uid.ImplicitVRLittleEndian if kind == "implicit" else uid.ExplicitVRLittleEndian
    return dicom(syntax=syntax, **lookup_table("VOILUTSequence", np.arange(4096), 16), **WHOLE_WINDOW)


KINDS = st.sampled_from(["explicit", "implicit", "compressed"])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=120, deadline=None)
@given(KINDS, st.floats(0.0, 1.0))
def test_a_truncated_file_is_refused_wherever_it_ends(kind: str, share: float) -> None:
    content = whole(kind)
    trailer = 10 if kind == "compressed" else 0  # of the compressed stream's end and the padding behind it
    with pytest.raises(InputError):
        decode_image(content[: int(share * (len(content) - trailer - 1))])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(KINDS, st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_a_damaged_file_never_fails_in_another_way(kind: str, place: int, patch: bytes) -> None:
    content = bytearray(whole(kind))
    start = 128 + place % (min(len(content), 9000) - 128)
    content[start : start + len(patch)] = patch
    # Any exception but InputError fails the test.
    with contextlib.suppress(InputError):
        assert decode_image(bytes(content)).mode == "RGB"


@pytest.mark.parametrize("name", ["good", "truncated", "wrong", *REFUSED])
def test_nothing_of_the_patient_is_told_logged_or_kept(
    name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    made = {"good": dicom, "truncated": lambda: dicom()[:-400], "wrong": lambda: dicom(Modality="CT")}
    content = made[name]() if name in made else refused(name)
    assert SECRET.encode() in content
    told = ""
    with caplog.at_level("DEBUG"):
        try:
            image = decode_image(content)
            assert name == "good"
            assert SECRET not in str(image.info)
            assert SECRET.encode() not in image.tobytes()
        except InputError as error:
            cause: BaseException | None = error
            while cause is not None:
                told, cause = told + repr(cause), cause.__cause__ or cause.__context__
    told += caplog.text + "".join(capsys.readouterr()) + "".join(str(warning.message) for warning in recwarn)
    assert "DOE" not in told
    assert "JANE" not in told
