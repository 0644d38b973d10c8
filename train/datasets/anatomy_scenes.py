"""Images with findings whose place is known, as latents and with the patient's own regions where wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline

from medviz.domains.chest_places import WORDINGS
from medviz.errors import InputError
from medviz.generation.sampling import latent_hw
from medviz.grounding.anatomy import Segmenter
from medviz.grounding.atlas import Atlas, place_boxes
from medviz.images import to_pil
from train.datasets.latents import encode, to_pixels
from train.datasets.placed_findings import PlacedFinding, placed_findings
from train.datasets.split import Split


@dataclass(frozen=True)
class Scene:
    """The images that are learnt from: what lies where in them.

    findings: index is the row in latents (N, C, h, w), float32. own: for each row the patient's own regions, or None.
    """

    findings: tuple[PlacedFinding, ...]
    latents: torch.Tensor
    own: tuple[Atlas | None, ...]

    def atlas(self, finding: PlacedFinding, shared: Atlas) -> Atlas:
        """Where the regions of a finding's image lie: its own, else the shared atlas."""
        return self.own[finding.index] or shared


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
