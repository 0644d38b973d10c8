"""Does the image fit its prompt as a whole? The cosine between the two in the space of a contrastively trained model.

CLIP (arXiv 2103.00020) at small size, trained by `python -m train contrastive` on the domain's own captions. Its text
half is kept whole: the generator's text encoder began as it, but has no projection and has learnt on since.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from medviz.errors import InputError, ModelError
from medviz.models.networks import load_network


class AlignmentNetwork:
    """Image and text encoders with their projections onto one sphere.

    Reads pixels in [-1, 1] at its own size. A prompt is encoded once, however often it is asked for.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str | torch.device = "cpu"
    ) -> None:
        """model: a CLIPModel; tokenizer: the one it was trained with."""
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.size_px = int(model.config.vision_config.image_size)
        self._known: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> AlignmentNetwork:
        """Read `folder`, the alignment/ that a contrastive run exports: a CLIPModel and its tokenizer.

        Raises ModelError when it is missing or damaged.
        """
        if not (Path(folder) / "tokenizer_config.json").is_file():
            raise ModelError(
                f"there is no contrastive model with its tokenizer in {folder}: name the alignment/ folder of a "
                "contrastive run's model (one exported before that folder was written has no text projection)"
            )
        model = load_network(Path(folder), CLIPModel, device)
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
        return cls(model, tokenizer, device)

    def similarity(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Cosine (B,) in [-1, 1] of each image (B, 3, H, W) in [-1, 1] with its prompt.

        Gradients flow to the images unless the caller turns them off; the images themselves are never changed. Raises
        InputError for another shape or another number of prompts.
        """
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise InputError(
                f"images must have the shape ({len(prompts)}, 3, H, W), one a prompt, got {tuple(images.shape)}"
            )
        pixels = images.to(self.device, torch.float32)
        if pixels.shape[-2:] != (self.size_px, self.size_px):
            pixels = F.interpolate(pixels, size=(self.size_px, self.size_px), mode="bilinear", antialias=True)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        seen = F.normalize(self.model.visual_projection(pooled), dim=-1)
        return (seen * self._text(prompts)).sum(dim=-1)

    def _text(self, prompts: Sequence[str]) -> torch.Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            tokens = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
            with torch.no_grad():
                pooled = self.model.text_model(
                    input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
                ).pooler_output
                read = F.normalize(self.model.text_projection(pooled), dim=-1)
            self._known.update(zip(new, read, strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])
