"""Does the generator repeat training images? Nearest training image of each synthetic one, by cosine similarity.

The yardstick is the same similarity of real images that were never trained on: two patients' images are alike to some
degree, and only what lies above that is suspicious.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medviz.errors import InputError

CHUNK_ROWS = 1024  # generated images compared at once: 1024 x 100,000 references are 400 MB
DEFAULT_QUANTILE = 0.99


@dataclass(frozen=True)
class Nearest:
    """Per generated image, the cosine similarity in [-1, 1] to its nearest reference and that reference's index.

    similarity: float32 (N,); index: int64 (N,).
    """

    similarity: NDArray[np.float32]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class MemorisedShare:
    """Share of generated images nearer to a training image than `threshold`, beside that of held-out real images.

    share, held_out_share: in [0, 1]; n, held_out_n: images counted; threshold: cosine similarity.
    """

    share: float
    n: int
    threshold: float
    held_out_share: float
    held_out_n: int


def nearest_similarity(generated: ArrayLike, references: ArrayLike, chunk_rows: int = CHUNK_ROWS) -> Nearest:
    """Find the nearest reference (M, D) of every generated embedding (N, D); rows need not be normalised.

    Works chunk_rows rows at a time in float32. Raises InputError for empty, mismatched, all-zero or non-finite rows.
    """
    rows, targets = _unit_rows(generated, "generated"), _unit_rows(references, "reference")
    if rows.shape[1] != targets.shape[1]:
        raise InputError(f"generated embeddings have {rows.shape[1]} dimensions, references {targets.shape[1]}")
    if chunk_rows < 1:
        raise InputError(f"chunk_rows must be at least 1, got {chunk_rows}")
    similarity = np.empty(len(rows), dtype=np.float32)
    index = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), chunk_rows):
        part = slice(start, start + chunk_rows)
        cosines = rows[part] @ targets.T
        index[part] = cosines.argmax(axis=1)
        similarity[part] = np.take_along_axis(cosines, index[part, None], axis=1)[:, 0]
    return Nearest(similarity=np.clip(similarity, -1.0, 1.0), index=index)


def held_out_threshold(held_out: Nearest, quantile: float = DEFAULT_QUANTILE) -> float:
    """The similarity that a share of 1 - quantile of held-out real images exceeds: what chance alone brings about."""
    if not 0.0 < quantile <= 1.0:
        raise InputError(f"the quantile must lie in (0, 1], got {quantile}")
    return float(np.quantile(held_out.similarity.astype(np.float64), quantile, method="higher"))


def memorised_share(generated: Nearest, held_out: Nearest, quantile: float = DEFAULT_QUANTILE) -> MemorisedShare:
    """Share of generated images above the threshold that held-out real images set.

    Both must have been compared with the same training images, and the held-out ones must not be among them. A share
    near held_out_share says that the generator is no nearer to its training images than other patients' images are.
    """
    threshold = held_out_threshold(held_out, quantile)
    return MemorisedShare(
        share=float(np.mean(generated.similarity > threshold)),
        n=len(generated.similarity),
        threshold=threshold,
        held_out_share=float(np.mean(held_out.similarity > threshold)),
        held_out_n=len(held_out.similarity),
    )


def _unit_rows(embeddings: ArrayLike, what: str) -> NDArray[np.float32]:
    rows = np.asarray(embeddings, dtype=np.float32)
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{what} embeddings must have the shape (images, dimensions), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise InputError(f"{what} embeddings hold values that are not finite")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError(f"{what} embedding {int(np.argmin(lengths))} is all zeros: it has no direction to compare")
    return rows / lengths
