"""Heat maps of words: from recorded attention to float32 (H, W) arrays that can be shown, compared and measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from medviz.errors import InputError
from medviz.grounding.capture import AttentionMaps, resize
from medviz.grounding.words import content_indices, token_indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def word_heat_maps(
    maps: AttentionMaps,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    word: str,
    size_hw: tuple[int, int],
    *,
    samples: Sequence[int] = (0,),
    time_bin: int | None = None,
    resolutions: Collection[tuple[int, int]] | None = None,
    relative_to_prompt: bool = False,
) -> tuple[np.ndarray, ...]:
    """One heat map (H, W), float32 in [0, 1], for each of the given samples of one prompt, all on one scale.

    Name a pair (baseline, aligned) to compare them: equal values mean equal attention, 0 is the least and 1 the most
    found in either. What is shown is attention to the word's tokens itself. Every place shares its attention between
    the word, the other words and the special tokens, which take most of it; that share's level differs from word to
    word, its variation over the image does not depend on it, hence the stretch to [0, 1].
    `relative_to_prompt` shows the share of the prompt's own words instead (see `AttentionMaps.heat`).

    Raises InputError when the word is not in the prompt or was cut off, or nothing was recorded.
    """
    if len(samples) == 0:
        raise InputError("at least one sample is needed, found none")
    tokens = token_indices(tokenizer, prompt, word)
    content = content_indices(tokenizer, prompt) if relative_to_prompt else None
    heats = [
        maps.heat(
            tokens,
            size_hw,
            sample=sample,
            time_bin=time_bin,
            resolutions=resolutions,
            content_indices=content,
        )
        for sample in samples
    ]
    return joint_scale(*heats)


def joint_scale(*heats: np.ndarray) -> tuple[np.ndarray, ...]:
    """Stretches maps together to [0, 1] by their common least and greatest value; maps that are all flat become 0."""
    low, high = min(float(heat.min()) for heat in heats), max(float(heat.max()) for heat in heats)
    if not np.isfinite([low, high]).all():
        raise InputError("a heat map holds values that are not finite")
    # Differences at the level of float32 rounding are not a picture of anything.
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return tuple(np.zeros(heat.shape, dtype=np.float32) for heat in heats)
    return tuple(np.clip((heat - low) / (high - low), 0.0, 1.0).astype(np.float32) for heat in heats)


def grounding_heat_map(
    maps: AttentionMaps,
    indices: Sequence[int],
    size_hw: tuple[int, int],
    *,
    sample: int = 0,
    resolutions: Collection[tuple[int, int]] | None = None,
    blur_sigma_px: float = 2.5,
) -> np.ndarray:
    """The heat map of arXiv 2506.10633 for grounding in a real image: float32 (H, W) in [0, 1].

    Mean over the phrase's tokens, stretched to [0, 1] for each layer and time bin, resized, averaged, blurred by
    `blur_sigma_px` pixels of the result, stretched again. With as many time bins as steps this is the paper's
    per-step stretch; with fewer the steps of a bin are averaged first.
    """
    chosen = maps.default_resolutions() if resolutions is None else tuple(resolutions)
    layers = [name for name in maps.layers if maps.grid(name) in chosen]
    if not layers:
        raise InputError(f"no attention was recorded at {chosen}; recorded: {maps.resolutions}")
    total = np.zeros(size_hw, dtype=np.float32)
    for name in layers:
        for time_bin in maps.filled_bins(name):
            probs = maps.probs(name, sample=sample, time_bin=time_bin)[..., list(indices)].mean(dim=-1)
            (stretched,) = joint_scale(probs.numpy())
            total += resize(torch.from_numpy(stretched), size_hw).numpy()
    blurred = gaussian_filter(total, sigma=blur_sigma_px, mode="nearest")
    return joint_scale(blurred)[0]
