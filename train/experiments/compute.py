"""What training a generator costs, in floating point operations: the same whichever machine did it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from medviz.errors import ModelError
from medviz.models.manifest import read_manifest
from train.evaluate.figures import Figure
from train.evaluate.statistics import Estimate

PASSES = 3
"""Passes that a step of training costs an image: one forward, and backward twice that."""
PETA = 1e15


def pass_flops(unet: UNet2DConditionModel, tokens: int) -> int:
    """Floating point operations of one pass of one image whose prompt has `tokens` embeddings."""
    size, channels = unet.config.sample_size, unet.config.in_channels
    embeds = torch.zeros(1, tokens, unet.config.cross_attention_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet.eval()(torch.zeros(1, channels, size, size), torch.tensor([0]), encoder_hidden_states=embeds)
    return int(counter.get_total_flops())


def spent(folder: Path) -> tuple[int, int]:
    """Images seen and floating point operations of all stages that trained the generator of a model folder.

    Read off its manifest. A stage of a smaller UNet, from which a wider one was grown, counts by its share of the
    parameters. Raises ModelError where the manifest names no such stage.
    """
    metrics = read_manifest(folder).metrics.values()
    stages = [
        stage for stage in metrics if isinstance(stage, Mapping) and {"images_seen", "unet_parameters"} <= {*stage}
    ]
    if not stages:
        raise ModelError(f"{folder}: its manifest does not say how many images its generator was trained on")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    text = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    one, parameters = pass_flops(unet, text.max_position_embeddings), unet.num_parameters()
    images = sum(int(stage["images_seen"]) for stage in stages)
    passes = sum(stage["images_seen"] * stage["unet_parameters"] / parameters for stage in stages)
    return images, round(PASSES * one * passes)


def cost(name: str, label: str, values: Mapping[str, float], table: str) -> Figure:
    """What each arm of a table costs, as a figure of it."""
    first, *others = ((arm, Estimate(float(value), None, None, 0)) for arm, value in values.items())
    return Figure(
        name=name,
        label=label,
        group="cost",
        baseline=first[1],
        aligned=dict(others),
        change={},
        higher_is_better=None,
        headline=True,
        table=table,
    )
