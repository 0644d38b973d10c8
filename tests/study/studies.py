"""Small studies for tests: noise instead of drawings, 32 px, and the user's own folder of other noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medviz.study.design import draw_up
from medviz.study.protocol import PHASES, Protocol

SIZE_PX = 32
ADAPTER = "attribute"


def draw_noise(prompts: Sequence[str], seeds: Sequence[int], adapter: str | None) -> list[Image.Image]:
    """Different noise for every prompt, seed and adapter."""
    return [noise_image([seed, int(adapter is None), len(prompt)]) for prompt, seed in zip(prompts, seeds, strict=True)]


def noise_image(seed: int | list[int], size_px: int = SIZE_PX) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8))


def make_real_images(folder: Path, count: int) -> Path:
    """JPEG files, larger than the study's images, with a comment as metadata."""
    folder.mkdir(parents=True)
    for number in range(count):
        noise_image(1000 + number, 48).save(folder / f"patient-{number}.jpg", comment=b"secret name")
    return folder


def make_study(folder: Path, cases: int = 12, real: int = 0, phases: Sequence[str] = PHASES, seed: int = 7) -> Protocol:
    """A dermatology study in `folder`; its real images, if any, in the folder of `real_folder_of`."""
    return draw_up(
        folder,
        "dermatology",
        draw_noise,
        adapter=ADAPTER,
        models={"sha256": "0" * 64, "steps": 1, "guidance_scale": 1.0},
        cases=cases,
        seed=seed,
        phases=[phase for phase in phases if real or phase != "detection"],
        real_folder=make_real_images(real_folder_of(folder), real) if real else None,
    )


def real_folder_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-real"
