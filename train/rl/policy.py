"""What is trained: a LoRA adapter on a frozen unet, and where wanted a running average of it that draws the images."""

import warnings
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from medviz.errors import InputError
from medviz.models.adapters import loaded_adapters
from train import seeding

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")


class Policy:
    """The adapter `name` of `unet`, which starts as no change at all and alone receives gradients.

    behaviour: the adapter that draws images: `name` itself, or its average where `averaged`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        name: str,
        *,
        rank: int,
        alpha: float,
        convolutions: bool = False,
        averaged: bool = False,
        seed: int = 0,
    ) -> None:
        """rank, alpha: of LoRA, whose change is scaled by alpha / rank; convolutions: also on the residual blocks' 3x3.

        Raises InputError when the unet already holds an adapter of that name.
        """
        if name in loaded_adapters(unet):
            raise InputError(f"the unet already holds an adapter {name!r}; train another name on the plain baseline")
        self.unet, self.name = unet, name
        self.behaviour = f"{name}-average" if averaged else name
        unet.requires_grad_(False).eval()
        targets = [*ATTENTION, *(CONVOLUTIONS if convolutions else ())]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the average beside the policy is meant
            for adapter in dict.fromkeys((self.behaviour, name)):
                torch.manual_seed(seeding.key(seed, "rl", "weights"))
                unet.add_adapter(
                    LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets), adapter
                )
        unet.set_adapter(name)
        for adapter in dict.fromkeys((self.behaviour, name)):
            for weight in self._live(adapter).values():
                weight.requires_grad_(adapter == name)
        unet.eval()

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained weights, always in the same order."""
        return list(self._live(self.name).values())

    def weights(self, adapter: str) -> dict[str, torch.Tensor]:
        """A copy of the weights of `adapter`, by names that do not contain the adapter's."""
        return {name: weight.detach().clone() for name, weight in self._live(adapter).items()}

    def set_weights(self, adapter: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Put `weights` into `adapter` in place. Raises InputError when the names differ."""
        live = self._live(adapter)
        if live.keys() != weights.keys():
            raise InputError(f"weights of another adapter: {sorted(live.keys() ^ weights.keys())[:4]} do not match")
        with torch.no_grad():
            for name, weight in live.items():
                weight.copy_(weights[name])

    def average(self, decay: float) -> None:
        """behaviour = decay behaviour + (1 - decay) policy; nothing to do where they are one."""
        if self.behaviour == self.name:
            return
        with torch.no_grad():
            for mean, weight in zip(self._live(self.behaviour).values(), self.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)

    def _live(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        part = f".{adapter}."
        return {n.replace(part, "."): w for n, w in self.unet.named_parameters() if part in n and "lora_" in n}
