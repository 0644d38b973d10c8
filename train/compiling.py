"""A UNet compiled for the many equal passes of a training."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor


def write_out_attention(unet: UNet2DConditionModel) -> None:
    """Have attention computed by matrix products and a softmax, not by the fused kernel.

    On a CPU with instructions for bf16 the fused kernel's backward pass does not use them: a training step takes a
    sixth longer with it. Nor can a compiler look into it.
    """
    unet.set_attn_processor(AttnProcessor())


def compiled_forward(unet: UNet2DConditionModel) -> Callable[..., Any]:
    """The forward of `unet`, compiled, and it alone: hooks, which count its passes, stay outside.

    On a CPU attention is written out from here on.
    """
    if unet.device.type == "cpu":
        write_out_attention(unet)
    return torch.compile(unet.forward)
