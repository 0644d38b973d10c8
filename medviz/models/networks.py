"""Small transformers networks of a model folder: classifiers and segmenters, with the card that travels with them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import PreTrainedModel

from medviz.errors import InputError, ModelError


def check_finite(weights: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise ModelError, naming the tensor and the file or folder `where`, for a weight that is not finite."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{where} is damaged: its weights {name} hold values that are not finite")


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restore torch's random state on exit: a network is built with random weights before stored ones replace them."""
    with torch.random.fork_rng(devices=()):  # networks are built on the CPU
        yield


def load_network(folder: Path, auto_class: Any, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The network in `folder` as `auto_class` (a transformers Auto class) builds it: frozen, eval mode, float32.

    Raises ModelError when the folder is missing or damaged, or when its weights leave a part of the network untrained.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"there is no network in {folder}: config.json is missing")
    try:
        model, report = auto_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the network in {folder} cannot be loaded: {error}") from error
    # transformers only warns of these and fills the gaps with random weights.
    lost = [*report["missing_keys"], *(str(entry) for entry in report["mismatched_keys"])]
    if lost:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {', '.join(sorted(lost)[:3])}")
    check_finite(model.state_dict(), folder)
    return model.to(device).eval().requires_grad_(False)


class Preparation:
    """From images in [-1, 1] of any size to what a network was trained on; its input is never changed.

    size_px: side of the square the network reads. mean, std: of pixels in [0, 1], one a channel.
    """

    def __init__(self, card: dict[str, Any], where: Path, device: str | torch.device = "cpu") -> None:
        """Raises ModelError, naming `where`, when size_px, mean or std of `card` is missing or makes no sense."""
        try:
            self.size_px = int(card["size_px"])
            values = [[float(v) for v in card[key]] for key in ("mean", "std")]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{where} is damaged: size_px, mean or std is missing or no number ({error!r})") from error
        finite = all(len(row) == 3 and all(math.isfinite(v) for v in row) for row in values)
        if self.size_px < 8 or not finite or min(values[1]) <= 0:
            raise ModelError(f"{where} is damaged: size_px {self.size_px}, mean and std {values} make no sense")
        mean, std = (torch.tensor(row, dtype=torch.float32, device=device).view(1, 3, 1, 1) for row in values)
        self.device, self._mean, self._std = device, mean, std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) in [-1, 1] -> float32 (B, 3, size_px, size_px), standardised; gradients flow through.

        Raises InputError for another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must have the shape (B, 3, H, W), got {tuple(images.shape)}")
        pixels = (images.to(self.device, torch.float32) + 1.0) / 2.0
        size = (self.size_px, self.size_px)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        return ((pixels - self._mean) / self._std).contiguous(memory_format=torch.channels_last)


def read_names(card: dict[str, Any], key: str, where: Path, count: int) -> tuple[str, ...]:
    """The list of names under `key` of a card. Raises ModelError unless it holds `count` different names."""
    names = card.get(key) if isinstance(card, dict) else None
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) and n for n in names):
        raise ModelError(f"{where} is damaged: {key} is no list of names")
    if len(set(names)) != len(names) or len(names) != count:
        raise ModelError(f"{where} does not fit its network: {count} outputs and {key} {', '.join(names)}")
    return tuple(names)
