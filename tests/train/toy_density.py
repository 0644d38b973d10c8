"""A two-dimensional Gaussian as a generator: its exact noise prediction, and one trainable correction.

The images are draws of N(mean, I). At signal level a the noised draws are N(sqrt(a) mean, I), so the noise prediction
is sqrt(1 - a) (x - sqrt(a) mean). Moving the mean by m changes it by -sqrt(a (1 - a)) m: one number, sqrt(a (1 - a)),
through one linear layer. With LoRA on that layer the family that can be learnt is exactly N(mean + m, I).
"""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, DPMSolverMultistepScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from torch import nn

SCALE = 10.0  # of latents over pixels, so that the pixels' range of [-1, 1] cuts nothing
SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon",
}  # fmt: skip


class GaussianUNet(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Latents (B, 2, 1, 1) and timesteps to the target of `prediction_type` for N(mean, I) around the origin."""

    @register_to_config
    def __init__(self, sample_size: int = 1, in_channels: int = 2, prediction_type: str = "epsilon"):
        super().__init__()
        self.to_q = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(self.to_q.weight)
        self.register_buffer("signal", DPMSolverMultistepScheduler(**SCHEDULE).alphas_cumprod, persistent=False)

    def forward(self, latents, timestep, encoder_hidden_states=None, return_dict=False):
        t = torch.as_tensor(timestep).reshape(-1).expand(len(latents))
        a = self.signal[t.long()].view(-1, 1)
        x = latents.flatten(1)
        noise = (1 - a).sqrt() * x + self.to_q((a * (1 - a)).sqrt())
        if self.config.prediction_type == "v_prediction":
            # v = sqrt(a) noise - sqrt(1 - a) x0 with x0 = (x - sqrt(1 - a) noise) / sqrt(a)
            noise = (noise - (1 - a).sqrt() * x) / a.sqrt()
        return (noise.view_as(latents),)


class Pixels(nn.Module):
    """Shows the two numbers as the first two colours of one pixel."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=SCALE, shift_factor=None)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def decode(self, latents, return_dict=False):
        return (torch.cat([latents, torch.zeros_like(latents[:, :1])], dim=1),)


def pipeline(base, prediction_type="epsilon"):
    """A pipeline of the Gaussian, with the words of `base`."""
    return SimpleNamespace(
        unet=GaussianUNet(prediction_type=prediction_type).eval(),
        vae=Pixels(),
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        scheduler=DPMSolverMultistepScheduler(**{**SCHEDULE, "prediction_type": prediction_type}, steps_offset=1),
    )


def points(images):
    """The draws (B, 2) that images show."""
    return SCALE * images[:, :2, 0, 0]
