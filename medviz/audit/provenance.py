"""The mark of a synthetic image: a label that can be seen, and PNG text that can be read by a program."""

import importlib.metadata
import math
import platform
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from medviz import __version__
from medviz.errors import InputError
from medviz.images import png_bytes

LABEL_TEXT = "SYNTHETIC"
MIN_SHOWN_SIDE_PX = 256  # smaller images are enlarged by a whole factor first: no letter is legible in 128 pixels
LIBRARIES = (
    "diffusers",
    "numpy",
    "opencv-python-headless",
    "peft",
    "pillow",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
)
"""Those that decide which pixels come out."""
_LABEL_HEIGHT = 0.07  # of the image's shorter side
_MIN_LABEL_PX = 16


@dataclass(frozen=True)
class Provenance:
    """How a synthetic image was made. adapter: None for the baseline. model_sha256: Manifest.sha256."""

    domain: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    adapter: str | None
    model_sha256: str

    def png_text(self) -> dict[str, str]:
        """The PNG text entries: keyword -> text."""
        return {
            "Synthetic": "yes",
            "Software": f"medviz {__version__}",
            "Domain": self.domain,
            "Prompt": self.prompt,
            "Seed": str(self.seed),
            "Steps": str(self.steps),
            "GuidanceScale": f"{self.guidance_scale:g}",
            "Adapter": self.adapter or "none",
            "ModelSha256": self.model_sha256,
        }


@cache
def versions() -> dict[str, str]:
    """Versions of medviz, Python and LIBRARIES, and the machine's architecture; "not installed" where one is absent."""
    return {
        "medviz": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def label(image: Image.Image) -> Image.Image:
    """Return a copy for showing, with a footer that reads SYNTHETIC; the image itself stays as it was, for scoring.

    Images under MIN_SHOWN_SIDE_PX are enlarged by a whole factor, so that the footer is legible. It lies on the bottom
    edge: white letters on a black band.
    """
    if min(image.size) < 1:
        raise InputError(f"an image of {image.width} x {image.height} pixels cannot be labelled")
    factor = math.ceil(MIN_SHOWN_SIDE_PX / min(image.size))
    shown = image.convert("RGB")
    if factor > 1:
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.BICUBIC)
    band_px = max(_MIN_LABEL_PX, round(min(shown.size) * _LABEL_HEIGHT))
    draw = ImageDraw.Draw(shown)
    draw.rectangle((0, shown.height - band_px, shown.width, shown.height), fill="black")
    draw.text(
        (shown.width / 2, shown.height - band_px / 2),
        LABEL_TEXT,
        fill="white",
        font=_font(round(band_px * 0.8)),
        anchor="mm",
    )
    return shown


def labelled_png(image: Image.Image, provenance: Provenance) -> bytes:
    """Encode a synthetic image for keeping: with its visible label and its provenance as PNG text."""
    return png_bytes(label(image), provenance.png_text())


def unlabelled_png(image: Image.Image, provenance: Provenance) -> bytes:
    """Encode the pixels as they were drawn, for scoring and measuring; the provenance stands in the PNG text."""
    return png_bytes(image.convert("RGB"), provenance.png_text())


@cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size_px)
