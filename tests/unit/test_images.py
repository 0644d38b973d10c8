"""Images: untrusted files become 8-bit RGB or an InputError; tensors and PNG keep every pixel."""

import contextlib
import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps

from medviz.errors import InputError, ModelError
from medviz.images import decode_image, fit_square, png_bytes, to_pil, to_tensor
from medviz.limits import MAX_UPLOAD_BYTES


def noise(width: int = 48, height: int = 40, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, bands) if bands > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=mode)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose pixels are a handful of zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_pixel_by_pixel(form: str) -> None:
    image = noise()
    assert np.array_equal(decode_image(encoded(image, form)), image)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_come_back_in_their_size(form: str) -> None:
    found = decode_image(encoded(noise(), form))
    assert (found.mode, found.size) == ("RGB", (48, 40))


def test_a_path_a_byte_string_and_a_pil_image_say_the_same(tmp_path: Path) -> None:
    image = noise()
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image, "PNG"))
    assert np.array_equal(decode_image(path), decode_image(path.read_bytes()))
    assert np.array_equal(decode_image(path), decode_image(image))


@pytest.mark.parametrize("form", ["GIF", "PPM", "ICO"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(InputError, match="PNG, JPEG, WebP, BMP, TIFF or DICOM"):
        decode_image(encoded(noise(), form))


@pytest.mark.parametrize("content", [b"not an image", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", b"<svg/>", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match="allowed is a PNG"):
        decode_image(content)


def test_an_empty_and_an_oversized_file_are_refused_by_their_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        decode_image(b"")
    path = tmp_path / "large.png"
    with path.open("wb") as stream:
        stream.truncate(MAX_UPLOAD_BYTES + 1)
    with pytest.raises(InputError, match="at most 32 MiB"):
        decode_image(path)


def test_a_path_that_is_not_there_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.png cannot be read") as caught:
        decode_image(tmp_path / "absent.png")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("size", [(5000, 5000), (9500, 9500), (60_000, 60_000), (2**31 - 1, 32)])
def test_a_pixel_bomb_is_refused_before_a_pixel_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    with pytest.raises(InputError, match="pixels"):
        decode_image(png_header(*size))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(form: str) -> None:
    content = encoded(noise(200, 200), form)
    with pytest.raises(InputError, match="allowed is"):
        decode_image(content[: len(content) // 2])


def test_a_single_pixel_and_a_thin_strip_are_refused() -> None:
    for size in ((1, 1), (31, 400)):
        with pytest.raises(InputError, match="at least 32"):
            decode_image(encoded(noise(*size), "PNG"))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_one_single_colour_is_refused(mode: str) -> None:
    with pytest.raises(InputError, match="one single colour"):
        decode_image(encoded(Image.new(mode, (64, 64)), "PNG"))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    first, second = noise(seed=1), noise(seed=2)
    options = {"lossless": True} if form == "WEBP" else {}
    content = encoded(first, form, save_all=True, append_images=[second], **options)
    assert np.array_equal(decode_image(content), first)


def test_the_orientation_of_the_exif_header_is_applied() -> None:
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    found = decode_image(encoded(image, "PNG", exif=exif))
    assert np.array_equal(found, image.transpose(Image.Transpose.ROTATE_270))


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((40, 40, 4), dtype=np.uint8)
    pixels[:20, :, 3] = 255
    found = np.asarray(decode_image(encoded(Image.fromarray(pixels), "PNG")))
    assert (found[:20] == 0).all()
    assert (found[20:] == 255).all()


def test_a_palette_with_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (0, 0, 40, 20))
    found = np.asarray(decode_image(encoded(image, "PNG", transparency=0)))
    assert (found[:20] == (200, 0, 0)).all()
    assert (found[20:] == 255).all()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_deep_grey_is_scaled_from_the_depth_that_holds_it(bits: int) -> None:
    full = 2**bits - 1
    pixels = np.linspace(0, full, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = np.asarray(decode_image(encoded(Image.fromarray(pixels), "PNG")))
    assert (found[..., 0] == found[..., 2]).all()
    assert np.abs(found[..., 0] - pixels / full * 255).max() <= 0.5


def test_eight_bits_widened_to_sixteen_come_back_as_they_were() -> None:
    grey = np.asarray(noise(mode="L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(decode_image(encoded(wide, "PNG")))[..., 0], grey)


def test_float_images_are_scaled_from_their_own_range_and_must_be_numbers() -> None:
    values = np.linspace(-3.0, 5.0, 64 * 64, dtype=np.float32).reshape(64, 64)
    found = np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF")))
    assert (found.min(), found.max()) == (0, 255)
    values[0, 0] = np.nan
    with pytest.raises(InputError, match="not numbers"):
        decode_image(encoded(Image.fromarray(values), "TIFF"))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=4)
)
def test_a_damaged_file_never_fails_in_another_way(form: str, place: int, patch: bytes) -> None:
    content = bytearray(encoded(noise(), form))
    start = place % len(content)
    content[start : start + len(patch)] = patch
    # Any exception but InputError fails the test.
    with contextlib.suppress(InputError):
        assert decode_image(bytes(content)).mode == "RGB"


def with_chunks(chunks: bytes, image: Image.Image | None = None) -> bytes:
    """A PNG file with more chunks behind its header."""
    content = encoded(image or noise(), "PNG")
    return content[:33] + chunks + content[33:]


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(16 * 2**20))),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(16 * 2**20))),
        chunk(b"tEXt", b"Comment\0" + b"x" * 3 * 2**20),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(64 * 2**20))),
        chunk(b"iCCP", b"profile\0\0" + b"no zlib stream"),
        chunk(b"tEXt", b""),
        chunk(b"prVt", bytes(1000)),
        chunk(b"tIME", b"x"),
    ],
    ids=["zTXt", "iTXt", "tEXt", "large profile", "damaged profile", "empty text", "private", "damaged time"],
)
def test_chunks_that_do_not_change_the_picture_are_skipped(extra: bytes) -> None:
    assert np.array_equal(decode_image(with_chunks(extra)), noise())


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_chunks(chunk(b"tEXt", b"") * (30 * 2**20 // 12)),
        lambda: with_chunks(chunk(b"IDAT", b"") * (30 * 2**20 // 12)),
        lambda: with_chunks(chunk(b"prVt", b"") * (30 * 2**20 // 12)),
        lambda: b"\xff\xd8" + b"\xff\xfe\x00\x02" * (30 * 2**20 // 4) + encoded(noise(), "JPEG")[2:],
        lambda: encoded(noise(), "JPEG")[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 10**6 + b"\xff\xd9",
    ],
    ids=["text", "pixels", "private", "JPEG segments", "JPEG scans"],
)
def test_a_file_of_millions_of_parts_is_refused_at_once(make: Callable[[], bytes]) -> None:
    content = make()
    started = time.thread_time()
    with pytest.raises(InputError, match=r"more than 50,000|at most 64"):
        decode_image(content)
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize("size", [(32, 700_000), (700_000, 32), (32, 513)])
def test_an_extreme_aspect_ratio_is_refused_before_a_pixel_is_decoded(size: tuple[int, int]) -> None:
    content = encoded(Image.linear_gradient("L").resize(size), "PNG")
    started = time.thread_time()
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels; the longer side may be at most 16 times"):
        decode_image(content)
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_end_marker_is_read(missing: int, progressive: bool) -> None:
    content = encoded(noise(200, 120), "JPEG", progressive=progressive)
    assert np.array_equal(decode_image(content[:-missing]), decode_image(content))


@pytest.mark.parametrize("missing", [4, 12, 200])
def test_a_jpeg_that_lacks_more_than_its_end_marker_is_refused(missing: int) -> None:
    content = encoded(noise(200, 120), "JPEG")
    with pytest.raises(InputError, match="damaged or incomplete"):
        decode_image(content[:-missing])


def ramp(high: int = 255) -> np.ndarray:
    """Rises from 0 in the top left corner to `high` in the bottom right one."""
    return np.linspace(0, high, 96 * 128).reshape(96, 128)


def levels_of(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content)).astype(int)


def tiff(values: np.ndarray, photometric: int, sample_format: int) -> bytes:
    """An uncompressed little-endian TIFF of one grey band, written by hand: Pillow writes few of these kinds."""
    pixels = values.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = {
        256: values.shape[1],
        257: values.shape[0],
        258: values.itemsize * 8,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: values.shape[0],
        279: len(pixels),
        339: sample_format,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize(
    ("kind", "sample_format", "low", "high"),
    [
        (np.uint8, 1, 0, 255),
        (np.int8, 2, -128, 127),
        (np.uint16, 1, 0, 65535),
        (np.int16, 2, -32768, 32767),
        (np.uint32, 1, 0, 2**32 - 1),
        (np.int32, 2, -(2**31), 2**31 - 1),
        (np.float32, 3, -3, 5),
    ],
)
def test_grey_tiffs_of_every_kind_are_dark_at_the_top_and_bright_below(
    kind: type, sample_format: int, low: int, high: int, photometric: int
) -> None:
    values = np.linspace(low, high, 96 * 128).reshape(96, 128)
    values = values[::-1, ::-1] if photometric == 0 else values
    found = levels_of(tiff(values.astype(kind), photometric, sample_format))[..., 0]
    assert np.abs(found - ramp()).max() <= 1.5


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_a_few_saturated_pixels_do_not_change_the_depth(bits: int) -> None:
    values = ramp(2**bits - 1).round().astype(np.uint16)
    values[3:8, 5:20] = 65535
    found = levels_of(encoded(Image.fromarray(values), "PNG"))[..., 0]
    assert found.mean() == pytest.approx(128, abs=2)
    assert (found[3:8, 5:20] == 255).all()


def png(values: np.ndarray) -> bytes:
    """A PNG file of 16-bit values (H, W, bands): grey with alpha, RGB or RGBA."""
    colour_type = {2: 4, 3: 2, 4: 6}[values.shape[2]]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("bands", [2, 3, 4])
def test_all_sixteen_bits_of_colour_and_alpha_are_read(bits: int, bands: int) -> None:
    values = np.dstack([ramp(2**bits - 1).round().astype(np.uint16)] * bands)
    if bands != 3:
        values[..., -1] = 65535
    assert np.abs(levels_of(png(values)) - ramp()[..., None]).max() <= 1


def test_the_order_of_deep_colours_and_their_transparency_are_kept() -> None:
    values = np.zeros((64, 64, 4), np.uint16)
    values[..., 0], values[..., 3], values[:20, :, 3] = 65535, 65535, 0
    found = np.asarray(decode_image(png(values)))
    assert (found[30:] == (255, 0, 0)).all()
    assert (found[:20] == 255).all()


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and green exchanged: a conversion that nobody can miss."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_are_converted_from_the_embedded_profile(form: str) -> None:
    image = Image.new("RGB", (64, 64), (200, 40, 60))
    image.paste((40, 200, 60), (0, 0, 64, 32))
    options = {"quality": 100} if form in ("JPEG", "WEBP") else {}
    plain = levels_of(encoded(image, form, **options))
    found = levels_of(encoded(image, form, icc_profile=swapped_profile(), **options))
    assert np.abs(found[8:24] - plain[40:56]).max() <= 6
    assert np.abs(found[40:56] - plain[8:24]).max() <= 6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_profile_that_says_srgb_or_nothing_changes_nothing(mode: str) -> None:
    image = noise(mode="RGB").convert(mode)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = np.asarray(decode_image(encoded(image, "PNG")))
    for profile in (srgb, b"not a profile", srgb[:200]):
        assert np.array_equal(decode_image(encoded(image, "PNG", icc_profile=profile)), plain)


def test_transparency_is_kept_beside_a_profile() -> None:
    image = Image.new("RGBA", (64, 64), (200, 40, 60, 255))
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    found = levels_of(encoded(image, "PNG", icc_profile=swapped_profile()))
    assert (found[:32] == 255).all()
    assert np.abs(found[32:] - (40, 200, 60)).max() <= 6


def test_an_alpha_of_zeros_in_a_bmp_is_no_transparency() -> None:
    image = noise(mode="RGB")
    pixels = np.dstack([np.asarray(image), np.zeros((40, 48), np.uint8)])
    content = encoded(Image.fromarray(pixels), "BMP")
    assert np.array_equal(decode_image(content), image)


def test_the_orientation_is_applied_to_deep_and_to_inverted_images() -> None:
    values = ramp(65535).round().astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    content = encoded(Image.fromarray(values), "PNG", exif=exif)
    assert np.abs(levels_of(content)[..., 0] - ramp()[::-1, ::-1]).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_in_every_format(form: str, orientation: int) -> None:
    image = Image.fromarray(np.kron([[0, 80], [160, 240]], np.ones((32, 48))).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = levels_of(encoded(image, form, exif=exif))
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image), int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 2


BIG = 24 * 2**20


def hostile_directory(entries: int, count: int) -> bytes:
    """A TIFF directory, at the start of a block, of tags that all name the same bytes."""
    tags = b"".join(struct.pack("<HHII", 40_000 + i, 7, count, 8) for i in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + tags + bytes(4)


def hostile_tiff(number: int) -> bytes:
    content = encoded(noise(), "TIFF")
    (start,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    tags = content[start + 2 : start + 2 + 12 * entries]
    tags += b"".join(struct.pack("<HHII", number + i, 7, BIG, 8) for i in range(2000))
    body = content[8:].ljust(BIG, b"\0")
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", entries + 2000) + tags + bytes(4)


def in_png_exif() -> bytes:
    return with_chunks(chunk(b"eXIf", hostile_directory(2000, BIG).ljust(BIG, b"\0")))


def in_webp_exif() -> bytes:
    return encoded(noise(), "WEBP", lossless=True, exif=b"Exif\0\0" + hostile_directory(2000, BIG).ljust(BIG, b"\0"))


def in_jpeg_exif() -> bytes:
    block = hostile_directory(2000, 60_000).ljust(65_000, b"\0")
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
    return b"\xff\xd8" + segment * 300 + encoded(noise(), "JPEG")[20:]  # without JFIF's resolution


@pytest.mark.parametrize("make", [lambda: hostile_tiff(40_000), in_png_exif, in_webp_exif, in_jpeg_exif])
def test_tags_that_name_the_same_bytes_again_and_again_take_no_memory(make: Callable[[], bytes]) -> None:
    content = make()
    started = time.thread_time()
    tracemalloc.start()
    try:
        assert decode_image(content).size == (48, 40)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(content)
    finally:
        tracemalloc.stop()
    assert time.thread_time() - started < 2.0


def test_pixel_tags_that_hold_more_than_the_file_are_refused() -> None:
    content = encoded(noise(), "TIFF")
    place = content.index(struct.pack("<HH", 258, 3))
    with pytest.raises(InputError, match="tags hold more than the file"):
        decode_image(content[: place + 4] + struct.pack("<I", 10**9) + content[place + 8 :])


@pytest.mark.parametrize("big", [False, True])
def test_both_kinds_of_tiff_are_read(big: bool) -> None:
    image = noise()
    assert np.array_equal(decode_image(encoded(image, "TIFF", big_tiff=big)), image)
    assert np.array_equal(decode_image(encoded(image, "TIFF", big_tiff=big, compression="tiff_lzw")), image)


def test_a_path_may_be_text(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encoded(noise(), "PNG"))
    assert np.array_equal(decode_image(str(path)), noise())
    with pytest.raises(InputError, match="NUL character"):
        decode_image("image\0.png")


def test_fit_square_keeps_the_centre_and_stretches_nothing() -> None:
    pixels = np.zeros((60, 120, 3), dtype=np.uint8)
    pixels[:, 30:90] = 255
    found = np.asarray(fit_square(Image.fromarray(pixels), 30))
    assert found.shape == (30, 30, 3)
    assert (found[:, 1:-1] == 255).all()


def test_tensors_hold_every_eight_bit_value_exactly() -> None:
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8))
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((3, 16, 16), torch.float32)
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    assert np.array_equal(to_pil(tensor), image)


def test_to_tensor_cuts_and_converts_when_asked() -> None:
    assert to_tensor(noise(90, 60, "L"), size_px=32).shape == (3, 32, 32)


def test_to_pil_clips_and_refuses_other_shapes_and_broken_values() -> None:
    assert np.asarray(to_pil(torch.full((3, 4, 4), 7.0))).min() == 255
    with pytest.raises(InputError, match=r"\(3, H, W\), got \(1, 3, 4, 4\)"):
        to_pil(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ModelError, match="not finite"):
        to_pil(torch.full((3, 4, 4), float("nan")))


def test_png_text_of_any_language_comes_back() -> None:
    image, text = noise(), {"Prompt": "hair – 皮膚 😀", "Seed": "1"}
    content = png_bytes(image, text)
    assert content == png_bytes(image, text)
    with Image.open(io.BytesIO(content)) as found:
        assert found.text == text
        assert np.array_equal(found, image)


@pytest.mark.parametrize("keyword", ["", "x" * 80, "clé"])
def test_png_keywords_are_short_and_ascii(keyword: str) -> None:
    with pytest.raises(InputError, match="PNG keyword"):
        png_bytes(noise(), {keyword: "value"})
