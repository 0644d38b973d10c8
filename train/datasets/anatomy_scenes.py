"""Images with findings whose place is known, as latents and with the patient's own regions where wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from medviz.domains.chest_places import WORDINGS, wordings_of
from medviz.errors import InputError
from medviz.generation.sampling import latent_hw
from medviz.grounding.anatomy import Segmenter
from medviz.grounding.atlas import Atlas, place_boxes
from medviz.images import to_pil
from train.datasets.latents import encode, to_pixels
from train.datasets.placed_findings import PlacedFinding, placed_findings
from train.datasets.split import Split

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class PlacedPrompt:
    """text: of a prompt for the image in row `index`. places: those of the image's atlas that it stands for."""

    index: int
    text: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Wording:
    """How prompts are worded: `template` holds {location} and {pathology} once each.

    place_share, finding_share: of prompts that name a place alone, any of the image's own, or a finding alone.
    """

    template: str
    place_share: float = 0.0
    finding_share: float = 0.0


@dataclass(frozen=True)
class Scene:
    """The images that are learnt from: what lies where in them.

    findings: index is the row in latents (N, C, h, w), float32. own: for each row the patient's own regions, or None.
    """

    findings: tuple[PlacedFinding, ...]
    latents: torch.Tensor
    own: tuple[Atlas | None, ...]

    def atlas(self, finding: PlacedFinding | PlacedPrompt, shared: Atlas) -> Atlas:
        """Where the regions of the image lie: its own, else the shared atlas."""
        return self.own[finding.index] or shared

    def prompt(
        self, finding: PlacedFinding, shared: Atlas, wording: Wording, rng: np.random.Generator | None = None
    ) -> PlacedPrompt:
        """A prompt for the image of a finding, drawn by `rng`; without one, the finding with its canonical place.

        A place named alone is any that the image's atlas has, each as likely as the others. A finding named alone
        stands for every place where the image has it.
        """
        if rng is None:
            return _both(finding, finding.wordings[0], wording.template)
        named = rng.random() if wording.place_share + wording.finding_share > 0 else 1.0
        if named < wording.place_share:
            there = self.atlas(finding, shared).places
            places = _drawn(sorted({each for each in WORDINGS.values() if set(each) <= set(there)}), rng)
            return PlacedPrompt(finding.index, _drawn(wordings_of(places), rng), places)
        if named < wording.place_share + wording.finding_share:
            alike = [f for f in self.findings if (f.index, f.finding) == (finding.index, finding.finding)]
            places = tuple(dict.fromkeys(place for each in alike for place in WORDINGS[each.wordings[0]]))
            return PlacedPrompt(finding.index, finding.finding, places)
        return _both(finding, _drawn(finding.wordings, rng), wording.template)


def _both(finding: PlacedFinding, location: str, template: str) -> PlacedPrompt:
    text = template.format(location=location, pathology=finding.finding)
    return PlacedPrompt(finding.index, text, WORDINGS[location])


def _drawn(several: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return several[int(rng.integers(len(several)))]


def open_scene(
    split: Split, pipeline: StableDiffusionPipeline, atlas: Atlas, *, notes: bool, segmenter: Segmenter | None = None
) -> Scene:
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
    return Scene(tuple(chosen), torch.cat(latents).clone(), tuple(kept.values()))


def own_atlas(segmenter: Segmenter, pixels: torch.Tensor) -> Atlas | None:
    """The patient's own regions in an image (3, H, W) in [-1, 1]; None where both lungs were not found."""
    regions = segmenter.segment(to_pil(pixels)).regions
    if not {"right_lung", "left_lung"} <= set(regions):
        return None
    boxes = place_boxes(regions["right_lung"], regions["left_lung"])
    return Atlas.of_boxes([boxes]) if boxes else None


def _known(wordings: Sequence[str], atlas: Atlas) -> tuple[str, ...]:
    return tuple(wording for wording in wordings if set(WORDINGS[wording]) <= set(atlas.places))
