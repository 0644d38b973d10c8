"""Random changes of an image that leave its labels true, drawn from a generator that names the sample.

A chest is never mirrored for a classifier: the heart would be on the wrong side. A segmenter may see it mirrored,
because its two lungs then change names and stay where the patient's sides are drawn.
"""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """How far to go; every range is drawn from evenly.

    rotate_deg: +- degrees. scale: factors (least, most). stretch: of width against height, in either direction.
    shift: +- share of the side. mirror, quarter_turns: half of the images are mirrored; any quarter turn is as likely.
    brightness: added, in share of the full range. contrast: factor 1 +- this. colour: gain of each channel, 1 +- this.
    blur_px: largest standard deviation of a Gaussian blur, which half of the images get. noise: largest standard
    deviation, in share of the full range. reflect: the image goes on as its reflection outside, else in black.
    """

    rotate_deg: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    stretch: float = 0.0
    shift: float = 0.0
    mirror: bool = False
    quarter_turns: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    colour: float = 0.0
    blur_px: float = 0.0
    noise: float = 0.0
    reflect: bool = True


# The blur and the noise are those of an autoencoder: what is judged later was decoded from latents.
CLASSIFIER: dict[str, Augmentation] = {
    "dermatology": Augmentation(
        rotate_deg=15,
        scale=(0.9, 1.12),
        shift=0.04,
        mirror=True,
        quarter_turns=True,
        brightness=0.08,
        contrast=0.15,
        colour=0.06,
        blur_px=0.7,
        noise=0.02,
    ),
    "radiology": Augmentation(
        rotate_deg=6,
        scale=(0.9, 1.1),
        stretch=0.06,
        shift=0.06,
        brightness=0.1,
        contrast=0.2,
        blur_px=0.7,
        noise=0.02,
        reflect=False,
    ),
}

# A detector is taught with pairs, whose light `counterfactuals.relit` changes; here is what moves pixels about.
EVIDENCE: dict[str, Augmentation] = {
    "dermatology": Augmentation(
        rotate_deg=15,
        scale=(0.85, 1.2),
        stretch=0.08,
        shift=0.05,
        mirror=True,
        quarter_turns=True,
        brightness=0.05,
        contrast=0.1,
        colour=0.05,
        blur_px=0.7,
        noise=0.02,
    ),
    # Never mirrored: the heart would be on the wrong side. Children are stretched to a square.
    "radiology": Augmentation(
        rotate_deg=8,
        scale=(0.85, 1.2),
        stretch=0.2,
        shift=0.08,
        brightness=0.08,
        contrast=0.2,
        blur_px=0.9,
        noise=0.02,
        reflect=False,
    ),
}

SEGMENTER: dict[str, Augmentation] = {
    "dermatology": Augmentation(
        rotate_deg=30,
        scale=(0.75, 1.3),
        stretch=0.15,
        shift=0.12,
        mirror=True,
        quarter_turns=True,
        brightness=0.12,
        contrast=0.25,
        colour=0.1,
        blur_px=1.0,
        noise=0.03,
    ),
    # Few masks, all of adults: children are stretched to a square and fill the frame differently.
    "radiology": Augmentation(
        rotate_deg=12,
        scale=(0.7, 1.4),
        stretch=0.25,
        shift=0.15,
        mirror=True,
        brightness=0.2,
        contrast=0.4,
        blur_px=1.2,
        noise=0.04,
        reflect=False,
    ),
}


@dataclass(frozen=True)
class Draw:
    """One drawn change. matrix: (2, 3), from source to changed pixels; mirrored: whether left and right changed."""

    matrix: np.ndarray
    mirrored: bool
    gain: np.ndarray
    offset: float
    blur_px: float
    noise: float
    reflect: bool
    noise_seed: int

    def image(self, image: np.ndarray) -> np.ndarray:
        """The changed image: uint8 (S, S, 3) from uint8 (S, S, 3), which is left as it was."""
        border = cv2.BORDER_REFLECT_101 if self.reflect else cv2.BORDER_CONSTANT
        changed = cv2.warpAffine(image, self.matrix, image.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=border)
        if self.blur_px > 0.1:
            changed = cv2.GaussianBlur(changed, (0, 0), self.blur_px)
        # Contrast turns about mid-grey, so that it does not act as brightness.
        levels = (changed.astype(np.float32) - 127.5) * self.gain + (127.5 + self.offset)
        if self.noise > 0:
            rng = np.random.Generator(np.random.Philox(self.noise_seed))
            levels += self.noise * rng.standard_normal(image.shape[:2], np.float32)[..., None]
        return np.clip(np.rint(levels), 0, 255).astype(np.uint8)

    def labels(self, labels: np.ndarray, swapped: tuple[tuple[int, int], ...] = ()) -> np.ndarray:
        """The same change of a label map uint8 (S, S); `swapped` classes change names when left and right do.

        What comes in from outside the image is a reflection, or class 0 where the image is continued in black.
        """
        border = cv2.BORDER_REFLECT_101 if self.reflect else cv2.BORDER_CONSTANT
        changed = cv2.warpAffine(labels, self.matrix, labels.shape[::-1], flags=cv2.INTER_NEAREST, borderMode=border)
        if self.mirrored:
            names = np.arange(256, dtype=np.uint8)
            for one, other in swapped:
                names[[one, other]] = names[[other, one]]
            changed = names[changed]
        return changed

    def mask(self, mask: np.ndarray, *, interpolated: bool = True) -> np.ndarray:
        """The same change of a mask float32 (S, S); what comes in from outside is a reflection, or 0."""
        border = cv2.BORDER_REFLECT_101 if self.reflect else cv2.BORDER_CONSTANT
        flags = cv2.INTER_LINEAR if interpolated else cv2.INTER_NEAREST
        return cv2.warpAffine(mask, self.matrix, mask.shape[::-1], flags=flags, borderMode=border)


def draw(augmentation: Augmentation, size_px: int, rng: np.random.Generator) -> Draw:
    """One change of square images of `size_px`. The same number of draws is made whatever is turned off."""
    a, even = augmentation, rng.uniform
    angle = np.deg2rad(even(-1, 1) * a.rotate_deg)
    scale = np.exp(even(np.log(a.scale[0]), np.log(a.scale[1])))
    stretch = np.exp(even(-1, 1) * np.log1p(a.stretch) / 2)
    shift = even(-1, 1, 2) * a.shift * size_px
    mirrored, turns = bool(even() < 0.5) and a.mirror, int(rng.integers(4)) * a.quarter_turns
    offset, contrast = even(-1, 1) * a.brightness * 255, 1 + even(-1, 1) * a.contrast
    colour = 1 + even(-1, 1, 3) * a.colour
    blur_px, noise = max(0.0, even(-1, 1)) * a.blur_px, even() * a.noise * 255
    angle += turns * np.pi / 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.diag([scale * stretch * (-1 if mirrored else 1), scale / stretch])
    middle = np.full(2, (size_px - 1) / 2)
    matrix = np.hstack([linear, (middle + shift - linear @ middle)[:, None]])
    return Draw(
        matrix=matrix,
        mirrored=mirrored,
        gain=(contrast * colour).astype(np.float32),
        offset=float(offset),
        blur_px=float(blur_px),
        noise=float(noise),
        reflect=a.reflect,
        noise_seed=int(rng.integers(2**63)),
    )
