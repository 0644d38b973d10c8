"""Network architectures of reward and judge, as multiples of named ones.

The paper's reward (arXiv 2503.15784) is an EfficientNet-B0. Its depthwise convolutions train several times slower on a
CPU than dense ones of the same cost, so the cpu preset keeps squeeze-and-excitation but takes dense ones (RegNet-Y).
"""

from collections.abc import Callable, Sequence

from torch import nn
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)


def _efficientnet(heads: int, width: float, depth: float, dropout: float, size_px: int) -> PreTrainedModel:
    standard = EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=depth,
        image_size=size_px,
        # Filters are rounded to multiples of 8, and transformers does not derive the last width from the others.
        hidden_dim=max(8, int(1280 * width + 4) // 8 * 8),
        dropout_rate=dropout,
        drop_connect_rate=0.1,
        batch_norm_momentum=0.1,
        num_labels=heads,
    )
    model = EfficientNetForImageClassification(standard)
    for layer in model.modules():
        # transformers starts normalisation weights at about 0, which never trains from scratch.
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return model


def _stages(widths: Sequence[int], depths: Sequence[int], width: float, depth: float) -> tuple[list[int], list[int]]:
    scaled = [max(8, round(channels * width / 8) * 8) for channels in widths]
    return scaled, [max(1, round(blocks * depth)) for blocks in depths]


def _regnet(heads: int, width: float, depth: float, dropout: float, size_px: int) -> PreTrainedModel:
    widths, depths = _stages((64, 128, 256, 512), (2, 2, 4, 2), width, depth)
    # One group a layer: grouped convolutions are slow on CPUs for the same reason as depthwise ones.
    return RegNetForImageClassification(
        RegNetConfig(
            embedding_size=max(8, widths[0] // 2),
            hidden_sizes=widths,
            depths=depths,
            groups_width=max(widths),
            layer_type="y",
            num_labels=heads,
        )
    )


def _resnet(heads: int, width: float, depth: float, dropout: float, size_px: int) -> PreTrainedModel:
    widths, depths = _stages((64, 128, 256, 512), (2, 2, 2, 2), width, depth)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=widths[0], hidden_sizes=widths, depths=depths, layer_type="basic", num_labels=heads)
    )


def _convnextv2(heads: int, width: float, depth: float, dropout: float, size_px: int) -> PreTrainedModel:
    widths, depths = _stages((40, 80, 160, 320), (2, 2, 6, 2), width, depth)
    return ConvNextV2ForImageClassification(
        ConvNextV2Config(hidden_sizes=widths, depths=depths, image_size=size_px, drop_path_rate=0.1, num_labels=heads)
    )


ARCHITECTURES: dict[str, Callable[[int, float, float, float, int], PreTrainedModel]] = {
    "efficientnet": _efficientnet,
    "regnet": _regnet,
    "resnet": _resnet,
    "convnextv2": _convnextv2,
}
"""(heads, width, depth, dropout, size_px) -> network with random weights."""
