"""Small networks that answer an image with one mask an attribute, at half the side of the square they read.

Both work on a grid of a quarter of the side, where a CPU is fastest, and give four logits a cell, which are laid out as
2x2 pixels (sub-pixel convolution, Shi et al., arXiv 1609.05158).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn
from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

STRIDE = 2
"""Pixels of the image a pixel of the mask."""
_CELL = 4
"""Pixels of the image a cell of the finest grid the networks work on."""
_PARTS = (_CELL // STRIDE) ** 2


class UNetMasks(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) on the image's 4x4 blocks.

    widths: channels at 1/4, 1/8, 1/16, ... of the side, multiples of 8. depth: residual blocks at each.
    """

    def __init__(self, attributes: int, widths: tuple[int, ...] = (32, 48, 64, 72), depth: int = 1) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            in_channels=3 * _CELL**2,
            out_channels=attributes * _PARTS,
            layers_per_block=depth,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, S / 2, S / 2) of standardised images (B, 3, S, S)."""
        # The network knows no time: it is always asked for step 0.
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(pixel_values, _CELL), 0).sample, _CELL // STRIDE)


class UperNetMasks(nn.Module):
    """UPerNet (Xiao et al., arXiv 1807.10221) on a ResNet (He et al., arXiv 1512.03385).

    widths: channels at 1/4, 1/8, 1/16 and 1/32 of the side. depths: residual blocks at each. decoder: channels of the
    feature pyramid.
    """

    def __init__(
        self,
        attributes: int,
        widths: tuple[int, ...] = (32, 48, 96, 128),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        decoder: int = 48,
    ) -> None:
        super().__init__()
        backbone = ResNetConfig(
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=list(depths),
            layer_type="basic",
            out_features=[f"stage{number}" for number in range(1, len(widths) + 1)],
        )
        self.upernet = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=backbone,
                hidden_size=decoder,
                use_auxiliary_head=False,
                num_labels=attributes * _PARTS,
            )
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, S / 2, S / 2) of standardised images (B, 3, S, S)."""
        features = self.upernet.backbone.forward_with_filtered_kwargs(pixel_values).feature_maps
        return F.pixel_shuffle(self.upernet.decode_head(features), _CELL // STRIDE)


ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {"unet": UNetMasks, "upernet": UperNetMasks}
"""Name -> (number of attributes, options of the class) -> network with random weights."""


def build(architecture: str, attributes: int, options: Mapping[str, Any]) -> nn.Module:
    """The network with random weights. Raises KeyError for an unknown name, TypeError for options it does not have."""
    shaped = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return ARCHITECTURES[architecture](attributes, **shaped)
