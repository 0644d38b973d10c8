"""The policy: a LoRA adapter on a frozen UNet, and optionally a running average of it that draws the images."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from medviz.errors import InputError
from medviz.models.adapters import load_lora, loaded_adapters, save_lora, using_adapter
from train import seeding

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2")
STARTED = "started-from"
STARTS: dict[str, Any] = {"kaiming": True, "gaussian": "gaussian"}
"""What LoRA's A starts from, B being 0: PEFT's Kaiming-uniform, or a Gaussian of spread 1 / rank (LoRA, arXiv
2106.09685), which at small ranks is several times wider, so that the same learning rate goes that much further."""


class LoraPolicy:
    """The adapter `name` of `unet`, which starts as no change at all and alone receives gradients.

    behaviour: the weights that draw images: `name` itself, or its running average where `averaged`.
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
        folded: bool = False,
        start: str = "kaiming",
        seed: int = 0,
    ) -> None:
        """rank, alpha: of LoRA, whose change is scaled by alpha / rank; convolutions: also on the residual blocks' 3x3;
        folded: see :func:`fold`; start: see STARTS.

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
                options = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=STARTS[start])
                unet.add_adapter(options, adapter)
        self._let_learn()
        if folded:
            fold(unet)
        unet.eval()

    def _let_learn(self) -> None:
        """Switch the trained weights on, and let them alone have gradients."""
        self.unet.set_adapter(self.name)
        self.unet.enable_adapters()
        for adapter in dict.fromkeys((self.behaviour, self.name)):
            for weight in self._live(adapter).values():
                weight.requires_grad_(adapter == self.name)

    def go_on_from(self, folder: Path) -> None:
        """Start from the adapter in `folder`, the average of the weights as well.

        Raises ModelError when it cannot be loaded, InputError when its shape is another.
        """
        load_lora(self.unet, folder, STARTED)
        try:
            found = self.weights(STARTED)
            scaling = next(m.scaling for m in self.unet.modules() if isinstance(m, LoraLinear) and STARTED in m.scaling)
            share = scaling[STARTED] / scaling[self.name]
        finally:
            self.unet.delete_adapters(STARTED)
        for which in dict.fromkeys((self.behaviour, self.name)):
            live = self._live(which)
            if {n: w.shape for n, w in live.items()} != {n: w.shape for n, w in found.items()}:
                raise InputError(f"the adapter in {folder} has another rank or other layers than the one to be trained")
            # the change is B A: one factor takes the share
            self.set_weights(which, {n: w * share if "lora_B" in n else w for n, w in found.items()})
        self._let_learn()

    def using(self, which: str | None) -> AbstractContextManager[None]:
        """The unet with the weights `which`, name or behaviour, or without the adapter for None."""
        return using_adapter(self.unet, which)

    def parameters(self) -> list[torch.Tensor]:
        """The trained weights, always in the same order."""
        return list(self._live(self.name).values())

    def weights(self, which: str) -> dict[str, torch.Tensor]:
        """A copy of the weights of `which`, by names that do not contain the adapter's."""
        return {name: weight.detach().clone() for name, weight in self._live(which).items()}

    def set_weights(self, which: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Put `weights` into `which` in place. Raises InputError when the names differ."""
        live = self._live(which)
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

    def save(self, folder: Path, details: Mapping[str, Any]) -> None:
        """Write an adapter folder; see `medviz.models.adapters.save_lora`."""
        save_lora(self.unet, folder, self.name, details=details)

    def _live(self, which: str) -> dict[str, torch.Tensor]:
        """The weights themselves, by names that do not contain `which`."""
        part = f".{which}."
        return {n.replace(part, "."): w for n, w in self.unet.named_parameters() if part in n and "lora_" in n}


def fold(unet: UNet2DConditionModel) -> None:
    """Let every linear layer with LoRA multiply its input once, by W + s B A, instead of by W, A and B one after the
    other: the same function and gradients, a fifth less time a training pass of a small UNet in fp32.

    Not under bf16 autocast: rounded there, W + s B A would lose a small change.
    """
    for layer in unet.modules():
        if isinstance(layer, LoraLinear):
            layer.forward = MethodType(_folded, layer)


def _folded(layer: LoraLinear, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """A stand-in for the forward of PEFT's layer, which it leaves what it does not fold."""
    if layer.disable_adapters or len(layer.active_adapters) != 1:
        return type(layer).forward(layer, x, *arguments, **named)
    (name,), base = layer.active_adapters, layer.base_layer
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return torch.nn.functional.linear(x, torch.addmm(base.weight, up, down, alpha=layer.scaling[name]), base.bias)
