"""A running average of weights whose length is a share of the run, not a number of steps."""

from collections.abc import Iterable

import numpy as np
import torch
from diffusers.training_utils import EMAModel

from medviz.errors import InputError


class PowerAverage(EMAModel):
    """A running average that grows with the run: step i of t weighs i^gamma.

    Its width, the standard deviation of that profile over t, stays the same however long the run is, where that of a
    fixed decay is right for one length (Karras et al. 2024, arXiv 2312.02696, section 3.1).
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], width: float) -> None:
        """Raises InputError for a width outside (0, 0.28): uniform weights, the widest, have 0.29."""
        if not 0 < width < 0.28:
            raise InputError(f"ema_width must be above 0 and below 0.28, found {width}")
        super().__init__(parameters, foreach=True)
        # width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
        inverse = width**-2
        self.gamma = float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def get_decay(self, optimization_step: int) -> float:
        """Share of the average that is kept at a step, numbered from 1."""
        return (1 - 1 / max(optimization_step, 1)) ** (self.gamma + 1)
