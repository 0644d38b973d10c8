"""A UNet compiled for the many equal passes of a training."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor


def compiled_forward(unet: UNet2DConditionModel) -> Callable[..., Any]:
    """The forward of `unet`, compiled, and it alone: hooks, which count its passes, stay outside.

    On a CPU attention is written out from here on, for the compiler to fuse. The fused kernel is one that the compiler
    cannot look into, and at these token counts a third slower there.
    """
    if unet.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    return torch.compile(unet.forward)
