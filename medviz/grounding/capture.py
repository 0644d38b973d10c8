"""Cross-attention capture: what each image position read from each token of the prompt, summed while sampling runs.

Nothing in the forward pass is replaced. Forward hooks read the queries and keys that an attention layer has already
computed (LoRA included) and repeat softmax(q k^T * scale) in float32 beside it, so the images cannot change, whatever
attention processor is installed. The maps follow DAAM, arXiv 2210.04885, section 2.2, without its fixed context length
and its assumption that half of the rows are unconditional.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from medviz.errors import InputError, MedvizError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

MOST_PASSES = 4
"""Rows of the UNet an image: without a prompt, with it, and two for guidance along a single word."""

COARSEST = 4
"""How many times coarser than the latents a grid may be of which a heat map is made."""

# record(layer name, attention_probs (rows, h, w, L) averaged over heads, float32)
Record = Callable[[str, torch.Tensor], None]


def attention_probs(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T * scale) averaged over heads: (B, h*w, L) in float32, each position's tokens summing to 1.

    `query` (B, h*w, heads*d) and `key` (B, L, heads*d) are what `to_q` and `to_k` return; `mask` (B, 1, L) is added
    to the scores.
    """
    batch, positions, _ = query.shape
    query = query.view(batch, positions, attention.heads, -1).transpose(1, 2)
    key = key.view(batch, key.shape[1], attention.heads, -1).transpose(1, 2)
    if attention.norm_q is not None:
        query = attention.norm_q(query)
    if attention.norm_k is not None:
        key = attention.norm_k(key)
    with torch.autocast(query.device.type, enabled=False):
        # The keys are scaled because there are fewer of them than positions.
        scores = torch.matmul(query.float(), (key.float() * attention.scale).transpose(-1, -2))
        if mask is not None:
            scores = scores + mask.float()[:, None]
        return scores.softmax(dim=-1).mean(dim=1)


class _Tap:
    """Holds what one attention layer computed during its forward pass, until the layer returns."""

    def __init__(self, layer: str, attention: Attention, rows: Callable[[int], int], record: Record, gradient: bool):
        self.layer, self.attention, self.rows, self.record, self.gradient = layer, attention, rows, record, gradient
        self.grid_hw: tuple[int, int] | None = None
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None

    def on_transformer(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.grid_hw = (hidden_states.shape[-2], hidden_states.shape[-1])

    def on_query(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.query = output

    def on_key(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.key = output

    def on_output(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> None:
        query, key = self.query, self.key
        self.query = self.key = None
        if query is None or key is None or self.grid_hw is None:
            raise MedvizError(f"{self.layer} ran without its to_q and to_k projections, so it cannot be captured")
        first = query.shape[0] - self.rows(query.shape[0])
        mask = kwargs.get("attention_mask")
        with nullcontext() if self.gradient else torch.no_grad():
            probs = attention_probs(self.attention, query[first:], key[first:], None if mask is None else mask[first:])
        self.record(self.layer, probs.unflatten(1, self.grid_hw))


@contextmanager
def watch(
    unet: UNet2DConditionModel,
    record: Record,
    *,
    rows: Callable[[int], int] = lambda batch: batch,
    gradient: bool = False,
) -> Iterator[tuple[str, ...]]:
    """Calls record(layer, attention_probs) after each cross-attention layer of the UNet; yields the layers' names.

    attention_probs is (rows, h, w, L), float32, averaged over heads, for the last `rows(batch)` rows of the batch.
    With `gradient` it stays part of the autograd graph, for losses on attention. All hooks are gone on every exit.
    Hooks belong to the UNet: one thread at a time may use it meanwhile.
    """
    layers: list[str] = []
    with ExitStack() as stack:
        for path, transformer in unet.named_modules():
            for index, block in enumerate(getattr(transformer, "transformer_blocks", ())):
                attention = getattr(block, "attn2", None)
                if attention is None or not attention.is_cross_attention:
                    continue
                layer = f"{path}.transformer_blocks.{index}.attn2"
                tap = _Tap(layer, attention, rows, record, gradient)
                for handle in (
                    transformer.register_forward_pre_hook(tap.on_transformer, with_kwargs=True),
                    attention.to_q.register_forward_hook(tap.on_query),
                    attention.to_k.register_forward_hook(tap.on_key),
                    attention.register_forward_hook(tap.on_output, with_kwargs=True),
                ):
                    stack.callback(handle.remove)
                layers.append(layer)
        if not layers:
            raise MedvizError("the UNet has no cross-attention layer to capture")
        yield tuple(layers)


class AttentionMaps:
    """Sums of attention probabilities, one (time bins, samples, h, w, L) float32 array a layer; made by `capture`.

    Memory: time_bins * samples * L * 4 bytes a position and layer, whatever the number of steps.
    """

    def __init__(self, *, conditional_only: bool = True, time_bins: int = 1, batch_size: int | None = None) -> None:
        if time_bins < 1:
            raise InputError(f"time_bins must be at least 1, found {time_bins}")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, found {batch_size}")
        self.conditional_only = conditional_only
        self.time_bins = time_bins
        self.batch_size = batch_size
        self._sampled = False
        self.latent_hw: tuple[int, int] | None = None
        self._bin: int | None = 0 if time_bins == 1 else None
        self._sums: dict[str, torch.Tensor] = {}
        self._weight = 1.0
        self._weights: dict[str, list[float]] = {}

    def begin_step(self, step: int, steps: int, batch_size: int, weight: float = 1.0) -> None:
        """Tells that step `step` (from 0) of `steps` comes next, for `batch_size` images, and counts `weight` times.

        Of the rows the UNet is then given, the last `batch_size` are the conditional ones: all of them without
        guidance, the second half with it; up to MOST_PASSES times as many rows where guidance goes along words too.
        """
        if not 0 <= step < steps or batch_size < 1:
            raise InputError(f"step must be in 0..{steps - 1} and batch_size >= 1, found {step} and {batch_size}")
        if not weight > 0:
            raise InputError(f"a step must count for more than 0, found {weight}")
        self._weight = weight
        self._bin = step * self.time_bins // steps
        self._sampled, self.batch_size = True, batch_size

    def add(self, layer: str, probs: torch.Tensor) -> None:
        """Adds one pass of a layer: attention_probs (samples, h, w, L), averaged over heads."""
        if self._bin is None:
            raise MedvizError("time bins need the step: pass maps to sample() or call maps.begin_step()")
        if layer not in self._sums:
            # Made outside inference mode, so that a later pass in another mode may still add to it.
            with torch.inference_mode(False):
                self._sums[layer] = torch.zeros((self.time_bins, *probs.shape), device=probs.device)
            self._weights[layer] = [0.0] * self.time_bins
        if self._sums[layer].shape[1:] != probs.shape:
            raise MedvizError(
                f"one capture holds one batch and size: {layer} gave {tuple(probs.shape)} "
                f"after {tuple(self._sums[layer].shape[1:])}"
            )
        self._sums[layer][self._bin].add_(probs, alpha=self._weight)
        self._weights[layer][self._bin] += self._weight

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers recorded so far, in the order in which the UNet runs them."""
        return tuple(self._sums)

    @property
    def samples(self) -> int:
        """How many images were recorded."""
        return next(iter(self._sums.values())).shape[1] if self._sums else 0

    @property
    def context_length(self) -> int:
        """L, the number of tokens each position read from."""
        return next(iter(self._sums.values())).shape[-1] if self._sums else 0

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """The grids (h, w) recorded, the finest first."""
        grids = {(sums.shape[2], sums.shape[3]) for sums in self._sums.values()}
        return tuple(sorted(grids, reverse=True))

    def grid(self, layer: str) -> tuple[int, int]:
        """The grid (h, w) of one recorded layer."""
        self._check_layer(layer)
        return self._sums[layer].shape[2], self._sums[layer].shape[3]

    def filled_bins(self, layer: str) -> tuple[int, ...]:
        """The time bins of one layer in which something was recorded."""
        self._check_layer(layer)
        return tuple(index for index, weight in enumerate(self._weights[layer]) if weight)

    def default_resolutions(self) -> tuple[tuple[int, int], ...]:
        """The grids at most COARSEST times coarser than the latents: below, a cell covers more than most findings.

        That is 64, 32 and 16 for Stable Diffusion at 512 px. The finest one stands in when none qualifies.
        """
        if self.latent_hw is None:
            return self.resolutions
        fine = tuple(grid for grid in self.resolutions if COARSEST * grid[0] >= self.latent_hw[0])
        return fine or self.resolutions[:1]

    def probs(self, layer: str, *, sample: int = 0, time_bin: int | None = None) -> torch.Tensor:
        """Mean attention probabilities (h, w, L) of one layer and image, float32 on the CPU, summing to 1 over L.

        Raises InputError for a layer, sample or time bin of which nothing was recorded.
        """
        self._check_layer(layer)
        sums, weights = self._sums[layer], self._weights[layer]
        if not 0 <= sample < sums.shape[1]:
            raise InputError(f"sample must be in 0..{sums.shape[1] - 1}, found {sample}")
        if time_bin is None:
            return (sums[:, sample].sum(dim=0) / sum(weights)).cpu()
        if not 0 <= time_bin < self.time_bins or weights[time_bin] == 0:
            raise InputError(
                f"nothing was recorded in time bin {time_bin}; bins with maps: {list(self.filled_bins(layer))}"
            )
        return (sums[time_bin, sample] / weights[time_bin]).cpu()

    def heat(
        self,
        token_indices: Sequence[int],
        size_hw: tuple[int, int],
        *,
        sample: int = 0,
        time_bin: int | None = None,
        resolutions: Collection[tuple[int, int]] | None = None,
        content_indices: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Attention to the given tokens at each place: float32 (H, W) = size_hw, in [0, 1], not stretched.

        Mean over tokens and, in each grid, over layers; resized bilinearly; every grid weighs the same.
        `content_indices` divides by the attention to all of those tokens: the share of the prompt's attention that
        fell on the word. Off by default: with it a prompt of one word is flat, because then only rivalry between
        words remains and not how strongly a place reads the word.

        Raises InputError for indices outside the context and when nothing was recorded.
        """
        self._check_indices(token_indices)
        if content_indices is not None:
            self._check_indices(content_indices)
        chosen = self.default_resolutions() if resolutions is None else tuple(resolutions)
        total = torch.zeros(size_hw, dtype=torch.float32)
        for grid in chosen:
            layers = [name for name in self._sums if self.grid(name) == grid]
            if not layers:
                raise InputError(f"no attention was recorded at {grid}; recorded: {self.resolutions}")
            probs = torch.stack([self.probs(name, sample=sample, time_bin=time_bin) for name in layers]).mean(dim=0)
            heat = probs[..., list(token_indices)].mean(dim=-1)
            if content_indices is not None:
                heat = heat / probs[..., list(content_indices)].sum(dim=-1).clamp_min(1e-12)
            total += resize(heat, size_hw)
        return (total / len(chosen)).numpy()

    def _check_layer(self, layer: str) -> None:
        if layer not in self._sums:
            raise InputError(f"no attention was recorded for layer {layer!r}; recorded: {', '.join(self._sums)}")

    def _check_indices(self, indices: Sequence[int]) -> None:
        if not self._sums:
            raise InputError("no attention was recorded: the UNet did not run inside capture()")
        if len(indices) == 0 or not all(0 <= index < self.context_length for index in indices):
            raise InputError(
                f"token indices must be one or more of 0..{self.context_length - 1}, found {list(indices)}"
            )

    def _rows(self, batch: int) -> int:
        if not self.conditional_only:
            return batch
        if self.batch_size is None:
            raise MedvizError(
                "which rows are conditional is not known: pass maps to sample(), call maps.begin_step(), "
                "or give capture() a batch_size"
            )
        if batch not in (self.batch_size, 2 * self.batch_size) and not (
            self._sampled and self.batch_size < batch <= MOST_PASSES * self.batch_size
        ):
            raise MedvizError(f"{self.batch_size} images take that many rows or twice as many, the UNet got {batch}")
        return self.batch_size

    def _on_unet(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["sample"]
        self.latent_hw = (latents.shape[-2], latents.shape[-1])


def resize(heat: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of a map (h, w) to (H, W)."""
    return functional.interpolate(heat[None, None], size=tuple(size_hw), mode="bilinear", align_corners=False)[0, 0]


@contextmanager
def capture(
    unet: UNet2DConditionModel,
    *,
    conditional_only: bool = True,
    time_bins: int = 1,
    batch_size: int | None = None,
) -> Iterator[AttentionMaps]:
    """Records the cross-attention of everything the UNet runs inside the `with` block.

        with capture(pipeline.unet) as maps:
            latents = sample(pipeline, prompts, seeds, maps=maps)
        maps.heat(token_indices(pipeline.tokenizer, prompts[0], "hair"), (128, 128))

    The sampler tells the maps its steps; around any other loop give `batch_size`, the number of images, so that
    guidance's unconditional rows are known and left out. `conditional_only=False` records every row of the batch.
    `time_bins` cuts the steps into that many equal parts, kept apart. The UNet is as before on every exit.
    """
    maps = AttentionMaps(conditional_only=conditional_only, time_bins=time_bins, batch_size=batch_size)
    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(maps._on_unet, with_kwargs=True).remove)
        stack.enter_context(watch(unet, maps.add, rows=maps._rows))
        yield maps
