"""Small networks that answer an image with one mask an attribute, at half the side of the square they read.

Both work on a grid of a quarter of the side, where a CPU is fastest. What they find there is laid out at half the side
(sub-pixel convolution, Shi et al., arXiv 1609.05158) and joined with the image's first features, which keep thin lines.
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
PRIOR_LOGIT = -4.0
"""Of every pixel at first: few pixels show an attribute (Lin et al., arXiv 1708.02002, section 4.1)."""
_COARSE = 12
"""Channels at half the side that come from the coarse grid."""
_FINE = 16
"""Channels of the U-Net's first features, at half the side."""


class _Masks(nn.Module):
    """Mask logits from what was found on the coarse grid and from the image's first features."""

    def __init__(self, attributes: int, fine: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(_COARSE + fine, attributes, 3, padding=1)
        nn.init.constant_(self.convolution.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """coarse: (B, 4 * _COARSE, S / 4, S / 4); fine: (B, C, S / 2, S / 2) -> (B, K, S / 2, S / 2)."""
        return self.convolution(torch.cat([F.silu(F.pixel_shuffle(coarse, STRIDE)), fine], dim=1))


class UNetMasks(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) behind two strided convolutions.

    widths: channels at 1/4, 1/8, 1/16, ... of the side, multiples of 8. depth: residual blocks at each.
    """

    def __init__(self, attributes: int, widths: tuple[int, ...] = (32, 48, 64, 72), depth: int = 1) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, _FINE, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(_FINE), nn.SiLU()
        )
        self.narrow = nn.Conv2d(_FINE, widths[0], 3, stride=2, padding=1)
        self.unet = UNet2DModel(
            in_channels=widths[0],
            out_channels=_COARSE * STRIDE**2,
            layers_per_block=depth,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=8,
            add_attention=False,
        )
        self.masks = _Masks(attributes, _FINE)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, S / 2, S / 2) of standardised images (B, 3, S, S)."""
        fine = self.fine(pixel_values)
        # The network knows no time: it is always asked for step 0.
        return self.masks(self.unet(self.narrow(fine), 0).sample, fine)


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
                num_labels=_COARSE * STRIDE**2,
            )
        )
        self.masks = _Masks(attributes, widths[0])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, S / 2, S / 2) of standardised images (B, 3, S, S)."""
        backbone = self.upernet.backbone
        fine = backbone.embedder.embedder(pixel_values)
        stages = backbone.encoder(backbone.embedder.pooler(fine), output_hidden_states=True).hidden_states
        return self.masks(self.upernet.decode_head(stages[1:]), fine)


ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {"unet": UNetMasks, "upernet": UperNetMasks}
"""Name -> (number of attributes, options of the class) -> network with random weights."""


def build(architecture: str, attributes: int, options: Mapping[str, Any]) -> nn.Module:
    """The network with random weights. Raises KeyError for an unknown name, TypeError for options it does not have."""
    shaped = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return ARCHITECTURES[architecture](attributes, **shaped)
