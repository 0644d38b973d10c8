"""Finished latents brought to the power spectrum that latents of real images have.

Guidance and alignment draw contrasts of some sizes stronger than real images have them; what learnt by squared errors
draws fine structure fainter, the mean of what might be there. What of that is alike in all pictures of a generator is
undone by a gain for each latent channel and spatial frequency, and what all pictures have too much of in their average
colour by an offset, measured once on training images and what is drawn of their captions (`train.spectrum`). So may
what is drawn in few steps be brought to what is drawn in many.

Rescaling what guidance overdrives is known with one factor a picture, the standard deviation's (Lin et al. 2023,
arXiv 2305.08891, section 3.4); here it is one a frequency, and learnt from real images.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from medviz.errors import ModelError

if TYPE_CHECKING:
    import torch

    from medviz.generation.plan import FewSteps
    from medviz.models.manifest import Manifest

BOUNDS = (0.25, 4.0)
"""What a gain may be: more is not mended by a gain, the generator draws something else than real images."""


@dataclass(frozen=True)
class Spectrum:
    """Gains (C, K) of amplitude at K spatial frequencies, rising, in cycles a latent cell; linear between two of them,
    constant beyond the first and last. At frequency 0 it is 1, and offsets (C,) are added.

    Raises ModelError for frequencies, gains or offsets that are none.
    """

    frequencies: tuple[float, ...]
    gains: tuple[tuple[float, ...], ...]
    offsets: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in pairwise(self.frequencies))
        if not self.frequencies or not rising or not self.frequencies[0] > 0:
            raise ModelError(f"a spectrum's frequencies must rise from above 0, found {self.frequencies}")
        if not self.gains or any(len(row) != len(self.frequencies) for row in self.gains):
            raise ModelError(f"a spectrum needs a gain for each of {len(self.frequencies)} frequencies and channel")
        low, high = BOUNDS
        if not all(math.isfinite(gain) and low <= gain <= high for row in self.gains for gain in row):
            raise ModelError(f"a spectrum's gains must be from {low} to {high}, found {self.gains}")
        if len(self.offsets) != len(self.gains) or not all(map(math.isfinite, self.offsets)):
            raise ModelError(f"a spectrum needs {len(self.gains)} finite offsets, found {self.offsets}")

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Spectrum:
        """What `as_json` gave. Raises ModelError for anything else."""
        try:
            frequencies = tuple(float(each) for each in content["frequencies"])
            gains = tuple(tuple(float(gain) for gain in row) for row in content["gains"])
            return cls(frequencies, gains, tuple(float(each) for each in content["offsets"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"this is no spectrum: {error!r}") from error

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        gains = [list(row) for row in self.gains]
        return {"frequencies": list(self.frequencies), "gains": gains, "offsets": list(self.offsets)}

    def __str__(self) -> str:
        """Its name: the same for the same gains, to a millionth."""
        rows = (self.frequencies, *self.gains, self.offsets)
        said = json.dumps([[round(value, 6) for value in row] for row in rows])
        return hashlib.sha256(said.encode()).hexdigest()[:8]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) with gains and offsets applied, float32. Raises ModelError for other channels."""
        import torch

        if latents.shape[1] != len(self.gains):
            raise ModelError(f"a spectrum of {len(self.gains)} channels does not fit latents {tuple(latents.shape)}")
        shape, device = latents.shape[-2:], latents.device
        transfer = torch.stack([self._at(radius(*shape, device=device), row) for row in self.gains])
        offsets = torch.tensor(self.offsets, device=device).view(1, -1, 1, 1)
        return torch.fft.irfft2(torch.fft.rfft2(latents.float()) * transfer, s=shape) + offsets

    def _at(self, frequency: torch.Tensor, row: tuple[float, ...]) -> torch.Tensor:
        """One channel's gain at each of `frequency` (h, w // 2 + 1)."""
        import torch

        known = torch.tensor(self.frequencies, device=frequency.device)
        gains = torch.tensor(row, device=frequency.device)
        if len(row) == 1:
            between = gains.expand(frequency.shape)
        else:
            right = torch.bucketize(frequency, known).clamp(1, len(row) - 1)
            share = ((frequency - known[right - 1]) / (known[right] - known[right - 1])).clamp(0.0, 1.0)
            between = gains[right - 1] * (1.0 - share) + gains[right] * share
        return torch.where(frequency == 0.0, torch.ones_like(between), between)


def radius(height: int, width: int, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Spatial frequency (h, w // 2 + 1) of each coefficient of `torch.fft.rfft2`, in cycles a cell."""
    import torch

    rows, columns = torch.fft.fftfreq(height, device=device), torch.fft.rfftfreq(width, device=device)
    return torch.hypot(rows[:, None], columns[None])


@dataclass(frozen=True)
class Spectra:
    """What finished latents of a model folder go through: `steps` where the generator began the picture, `few_steps`
    where its few-step adapter drew all of it; None: nothing."""

    steps: Spectrum | None = None
    few_steps: Spectrum | None = None

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Spectra:
        """Those of a model folder, which may have none. Raises ModelError for anything that is none."""
        unknown = sorted(set(manifest.spectra) - {field.name for field in fields(cls)})
        if unknown:
            raise ModelError(f"the manifest of {manifest.domain!r} has spectra for {', '.join(unknown)}, unknown ways")
        return cls(**{name: Spectrum.of_json(each) for name, each in manifest.spectra.items()})

    def of(self, few_steps: FewSteps | None) -> Spectrum | None:
        """That of a drawing, by how `few_steps` has part in it."""
        return self.few_steps if few_steps and few_steps.lead is None else self.steps
