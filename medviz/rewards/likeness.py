"""Does the image look like real ones rather than like what the generator draws now? The witness of the two.

Maximum mean discrepancy (Gretton et al. 2012, section 2.3) has a witness: w(x) = E k(x, real) - E k(x, drawn), with
E[w(real)] - E[w(drawn)] = MMD^2. Pictures that move up w take the generator's distribution down the steepest way to the
real one, so as a reward beside others it holds back what makes all pictures alike or unlike any photograph. It speaks
of a distribution: real and drawn images must show one mix of things, and the drawn ones must be the policy's present.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from medviz.errors import InputError

SCALES = (0.5, 1.0, 2.0)
"""Widths of the kernel, as multiples of the median distance between real images."""


class Likeness:
    """The witness in one feature space; a bounded kernel, so that no image earns more by being extreme.

    k(x, y) = mean over SCALES s of exp(-|x - y|^2 / (2 s^2 m^2)), m the median distance between real images.
    """

    def __init__(self, embed: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor) -> None:
        """embed: images (B, 3, H, W) in [-1, 1] -> features (B, D); real (M, D): features of real images.

        Raises InputError for fewer than 2 of them, and when they are all the same.
        """
        if real.ndim != 2 or len(real) < 2:
            raise InputError(f"features of real images need the shape (2 or more, D), found {tuple(real.shape)}")
        self.embed, self.real = embed, real.float()
        self._width = torch.pdist(self.real).median()
        if not self._width > 0:
            raise InputError("the real images all have the same features: nothing can be told from them")
        self._drawn = self.real[:0]

    @property
    def drawn(self) -> torch.Tensor:
        """Features (N, D) of what the generator draws now, to be set before anything is rewarded."""
        return self._drawn

    @drawn.setter
    def drawn(self, features: torch.Tensor) -> None:
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != self.real.shape[1]:
            raise InputError(
                f"features of drawn images need the shape (2 or more, {self.real.shape[1]}), found "
                f"{tuple(features.shape)}"
            )
        self._drawn = features.to(self.real)

    def witness(self, images: torch.Tensor) -> torch.Tensor:
        """w (B,) in [-1, 1] of images (B, 3, H, W) in [-1, 1]; gradients flow to them unless turned off.

        Raises InputError while it is not known what the generator draws.
        """
        if not len(self.drawn):
            raise InputError("no drawn images to tell real ones from")
        features = self.embed(images).float()
        return self._kernel(features, self.real).mean(dim=1) - self._kernel(features, self.drawn).mean(dim=1)

    def _kernel(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squared = torch.cdist(x, y).square() / self._width.square()
        return torch.stack([torch.exp(-squared / (2 * scale**2)) for scale in SCALES]).mean(dim=0)
