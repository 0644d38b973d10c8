"""A pair without models: noise for images and maps, so that what is written of it can be checked."""

import numpy as np
from PIL import Image

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.results import Drawing, Pair, RegionAttention, Score, WordAttention

SIDE_PX = 48
WORDS = {"dermatology": ("melanoma", "hair"), "radiology": ("opacity", "right lower zone")}


def noise_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8))


def heat_map(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((SIDE_PX, SIDE_PX)).astype(np.float32)


def make_pair(domain: str = "dermatology") -> Pair:
    """A pair of 48 x 48 pixels with two words, outlines of each region of the domain, and a score without a value."""
    words = WORDS[domain]

    def look_up(word: str) -> WordAttention:
        if word not in words:
            raise InputError(f"{word} is not in the prompt")
        figures = (RegionAttention("lesion", 0.4, 0.6, None, 1.5),)
        return WordAttention(word, heat_map(len(word)), heat_map(len(word) + 9), figures)

    regions = [region.name for region in get_domain(domain).regions]
    masks = np.random.default_rng(3).random((len(regions), SIDE_PX, SIDE_PX)) > 0.5
    return Pair(
        domain=domain,
        prompt=f"an image with {' and '.join(words)}",
        seed=7,
        steps=20,
        guidance_scale=3.0,
        adapter="attribute",
        models={"preset": "tiny", "unet": "ab" * 32, "segmenter": "cd" * 32},
        words=words,
        baseline=Drawing(noise_image(1), dict(zip(regions, masks, strict=True))),
        aligned=Drawing(noise_image(2), dict(zip(regions, ~masks, strict=True))),
        scores=(Score("Hair", "reward", 0.25, None), Score("Hair", "judge", 0.5, 0.75)),
        warnings=("careful",),
        timings_s={"total": 1.5},
        look_up=look_up,
    )
