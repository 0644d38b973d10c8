"""Are pictures real ones' like, and are all real ones covered? A distance alone does not tell the two apart.

Precision and recall: Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 to 3. Density and coverage: Naeem et al.
2020, arXiv 2002.09797, equations 3 and 4, which one stray image cannot inflate. All look at balls around images that
reach to their k-th nearest neighbour among their own kind, in the space of a feature network given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

NEIGHBOURS = 5


@dataclass(frozen=True)
class Manifold:
    """One value an image; each figure is its mean.

    Of N generated images: precision (N,) 1.0 inside any real image's ball, density (N,) the real balls around it over
    k. Of M real images: recall (M,) 1.0 inside any generated image's ball, coverage (M,) 1.0 where a generated image
    is inside its own.
    """

    precision: np.ndarray
    density: np.ndarray
    recall: np.ndarray
    coverage: np.ndarray


def manifold(generated: np.ndarray, reference: np.ndarray, neighbours: int = NEIGHBOURS) -> Manifold:
    """Compare features (N, D) with the reference's (M, D); the values depend on N and M, so compare equal ones only.

    Raises ValueError when a set has no more images than `neighbours` or the widths differ.
    """
    for name, features in (("generated", generated), ("reference", reference)):
        if features.ndim != 2 or len(features) <= neighbours:
            raise ValueError(f"{name} features need shape (N > {neighbours}, D), found {features.shape}")
    between = cdist(generated.astype(np.float64), reference.astype(np.float64))
    inside_real = between < _reach(reference, neighbours)
    inside_generated = between < _reach(generated, neighbours)[:, None]
    return Manifold(
        precision=inside_real.any(axis=1).astype(np.float64),
        density=inside_real.sum(axis=1) / neighbours,
        recall=inside_generated.any(axis=0).astype(np.float64),
        coverage=inside_real.any(axis=0).astype(np.float64),
    )


def _reach(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance (N,) of each image to its k-th nearest other one."""
    wide = features.astype(np.float64)
    # the image itself is the nearest, at distance zero
    return np.partition(cdist(wide, wide), neighbours, axis=1)[:, neighbours]
