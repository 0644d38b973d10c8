"""Images with findings whose place is known, as latents and with the patient's own regions where wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from medviz.domains.chest_places import WORDINGS, wordings_of
from medviz.errors import InputError
from medviz.generation.sampling import latent_hw
from medviz.grounding.anatomy import Segmenter
from medviz.grounding.atlas import Atlas, place_boxes
from medviz.images import to_pil
from train.datasets.latents import encode, to_pixels
from train.datasets.placed_findings import PlacedFinding, placed_findings
from train.datasets.scenes import ScenePrompt, drawn
from train.datasets.split import Split


@dataclass(frozen=True)
class PlacedPrompts:
    """How prompts are made of findings with their place: `template` holds {location} and {pathology} once each.

    place_share, finding_share: of prompts that name a place alone, any of the image's own, or a finding alone. jitter,
    spread: of the Gaussians, see `Atlas.heat`.
    """

    template: str = "{location} {pathology}"
    place_share: float = 0.0
    finding_share: float = 0.0
    jitter: float = 0.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        """Raises InputError naming the option that is out of range and what is allowed."""
        if any(self.template.count(part) != 1 for part in ("{location}", "{pathology}")):
            raise InputError(f"template must hold {{location}} and {{pathology}} once each, found {self.template!r}")
        if not (min(self.place_share, self.finding_share) >= 0 and self.place_share + self.finding_share <= 1):
            raise InputError(
                "place_share and finding_share must be at least 0 and together at most 1, found "
                f"{self.place_share} and {self.finding_share}"
            )
        if not self.jitter >= 0:
            raise InputError(f"jitter must be at least 0, found {self.jitter}")
        if not self.spread > 0:
            raise InputError(f"spread must be greater than 0, found {self.spread}")


@dataclass(frozen=True)
class PlacedScene:
    """Findings in chest X-rays, drawn to the Gaussians of their places; see `train.datasets.scenes.Scene`.

    findings: index is the row in latents. own: for each row the patient's own regions, or None. atlas: the mean
    anatomy, which stands in where an image has no regions of its own.
    """

    findings: tuple[PlacedFinding, ...]
    latents: torch.Tensor
    own: tuple[Atlas | None, ...]
    atlas: Atlas
    prompts: PlacedPrompts = PlacedPrompts()
    phrases: ClassVar[tuple[str, ...]] = tuple(WORDINGS)

    def __len__(self) -> int:
        return len(self.findings)

    def prompt(self, row: int, rng: np.random.Generator | None = None) -> ScenePrompt:
        """See `Scene.prompt`: a finding with its place, or as `prompts` says one of the two alone.

        A place named alone is any that the image's atlas has, each as likely as the others. A finding named alone
        stands for every place where the image has it.
        """
        finding, how = self.findings[row], self.prompts
        atlas = self.own[finding.index] or self.atlas
        if rng is None:
            text, places = self._both(finding, finding.wordings[0])
            return ScenePrompt(finding.index, text, partial(atlas.heat, places, spread=how.spread))
        named = rng.random() if how.place_share + how.finding_share > 0 else 1.0
        if named < how.place_share:
            places = drawn(sorted({each for each in WORDINGS.values() if set(each) <= set(atlas.places)}), rng)
            text = drawn(wordings_of(places), rng)
        elif named < how.place_share + how.finding_share:
            alike = [f for f in self.findings if (f.index, f.finding) == (finding.index, finding.finding)]
            places = tuple(dict.fromkeys(place for each in alike for place in WORDINGS[each.wordings[0]]))
            text = finding.finding
        else:
            text, places = self._both(finding, drawn(finding.wordings, rng))
        # Drawn once: every layer sees one target.
        seed = int(rng.integers(2**63))
        return ScenePrompt(finding.index, text, partial(self._jittered, atlas, places, seed))

    def _both(self, finding: PlacedFinding, location: str) -> tuple[str, tuple[str, ...]]:
        return self.prompts.template.format(location=location, pathology=finding.finding), WORDINGS[location]

    def _jittered(
        self, atlas: Atlas, places: tuple[str, ...], seed: int, grid_hw: tuple[int, int]
    ) -> NDArray[np.float32]:
        rng = np.random.Generator(np.random.Philox(seed))
        return atlas.heat(places, grid_hw, jitter=self.prompts.jitter, rng=rng, spread=self.prompts.spread)


def open_placed_scene(
    split: Split,
    pipeline: StableDiffusionPipeline,
    atlas: Atlas,
    *,
    notes: bool,
    segmenter: Segmenter | None = None,
    prompts: PlacedPrompts | None = None,
) -> PlacedScene:
    """The placed findings of a split with their latents; with a segmenter, of images whose lungs it finds alone.

    Raises InputError for the test split, which is never learnt from nor chosen by, and when nothing is left.
    """
    if split.name == "test":
        raise InputError("the test split is for reports alone")
    findings = placed_findings(split, atlas, notes=notes)
    kept: dict[int, Atlas | None] = {}
    latents: list[torch.Tensor] = []
    side_px = latent_hw(pipeline.unet.config)[0] * int(pipeline.vae_scale_factor)
    for index in dict.fromkeys(finding.index for finding in findings):
        pixels = to_pixels(split.image(index, side_px)[None])
        own = None if segmenter is None else own_atlas(segmenter, pixels[0])
        if segmenter is None or own is not None:
            kept[index] = own
            with torch.inference_mode():
                latents.append(encode(pipeline.vae, pixels).float().cpu())
    rows = {index: row for row, index in enumerate(kept)}
    chosen = [
        PlacedFinding(rows[finding.index], finding.finding, known, finding.source)
        for finding in findings
        if finding.index in rows and (known := _known(finding.wordings, kept[finding.index] or atlas))
    ]
    if not chosen:
        raise InputError(f"no image of the {split.name} split has a finding with a known place")
    return PlacedScene(
        tuple(chosen), torch.cat(latents).clone(), tuple(kept.values()), atlas, prompts or PlacedPrompts()
    )


def own_atlas(segmenter: Segmenter, pixels: torch.Tensor) -> Atlas | None:
    """The patient's own regions in an image (3, H, W) in [-1, 1]; None where both lungs were not found."""
    regions = segmenter.segment(to_pil(pixels)).regions
    if not {"right_lung", "left_lung"} <= set(regions):
        return None
    boxes = place_boxes(regions["right_lung"], regions["left_lung"])
    return Atlas.of_boxes([boxes]) if boxes else None


def _known(wordings: Sequence[str], atlas: Atlas) -> tuple[str, ...]:
    return tuple(wording for wording in wordings if set(WORDINGS[wording]) <= set(atlas.places))
