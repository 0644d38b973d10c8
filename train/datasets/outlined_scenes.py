"""Dermoscopic images with the lesion and the structures that an expert outlined, as latents and masks."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from medviz.errors import InputError
from medviz.generation.sampling import latent_hw
from train.datasets.grounded_phrases import dermoscopic_masks
from train.datasets.latents import encode, to_pixels
from train.datasets.scenes import ScenePrompt
from train.datasets.split import Split

ENCODED = 32
"""Images that are encoded at a time."""
LESION = "lesion"


@dataclass(frozen=True)
class OutlinedScene:
    """Outlined regions, drawn to their masks; see `train.datasets.scenes.Scene`.

    regions: phrase -> (row in latents, mask bool (h, w)) of every image in which it is outlined. Rows go through the
    phrases in turn, so that a rare one is learnt as often as a common one.
    """

    regions: dict[str, tuple[tuple[int, NDArray[np.bool_]], ...]]
    latents: torch.Tensor
    atlas: None = None

    @property
    def phrases(self) -> tuple[str, ...]:
        """Those that are outlined anywhere."""
        return tuple(self.regions)

    def __len__(self) -> int:
        return len(self.regions) * max(map(len, self.regions.values()))

    def prompt(self, row: int, rng: np.random.Generator | None = None) -> ScenePrompt:
        """See `Scene.prompt`: the phrase alone; nothing is left to chance."""
        phrase = self.phrases[row % len(self.regions)]
        index, mask = self.regions[phrase][row // len(self.regions) % len(self.regions[phrase])]
        return ScenePrompt(index, phrase, partial(share_of_cells, mask))


def share_of_cells(mask: NDArray[np.bool_], grid_hw: tuple[int, int]) -> NDArray[np.float32]:
    """The share of every cell of a grid that a mask (H, W) covers: float32 (h, w) in [0, 1]."""
    return cv2.resize(mask.astype(np.float32), grid_hw[::-1], interpolation=cv2.INTER_AREA)


def open_outlined_scene(split: Split, pipeline: StableDiffusionPipeline) -> OutlinedScene:
    """The outlined structures of a split, and the lesion of the images that have any.

    Raises InputError for the test split, which is never learnt from nor chosen by, and when nothing is outlined.
    """
    if split.name == "test":
        raise InputError("the test split is for reports alone")
    side_px = latent_hw(pipeline.unet.config)[0] * int(pipeline.vae_scale_factor)
    found: dict[str, list[tuple[int, NDArray[np.bool_]]]] = {}
    for kind, (column, phrase) in dermoscopic_masks().items():
        if kind != LESION:
            outlined = (i for i, record in enumerate(split.records) if record.get(column))
            found[phrase] = _masks(split, outlined, column, side_px)
    images = sorted({index for masks in found.values() for index, _ in masks})
    if not images:
        raise InputError(f"no image of the {split.name} split has an outlined structure")
    column, phrase = dermoscopic_masks()[LESION]
    found[phrase] = _masks(split, images, column, side_px)
    rows = {index: row for row, index in enumerate(images)}
    with torch.inference_mode():
        latents = [
            encode(pipeline.vae, to_pixels(split.images(side_px, images[start : start + ENCODED]))).float().cpu()
            for start in range(0, len(images), ENCODED)
        ]
    regions = {phrase: tuple((rows[index], mask) for index, mask in masks) for phrase, masks in found.items() if masks}
    return OutlinedScene(regions, torch.cat(latents).clone())


def _masks(split: Split, indices: Iterable[int], column: str, side_px: int) -> list[tuple[int, NDArray[np.bool_]]]:
    masks = ((index, split.mask(index, column, side_px)) for index in indices)
    return [(index, mask) for index, mask in masks if mask is not None and mask.any() and not mask.all()]
