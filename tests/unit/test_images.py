"""Images: untrusted files become 8-bit RGB or an InputError; tensors and PNG keep every pixel."""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

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


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose pixels are a handful of zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

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
