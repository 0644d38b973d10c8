"""Image-caption contrastive learning (CLIP) at small size: the tokenizer, the text encoder and a feature network.

The text half starts the generator's text encoder. The image half (a ViT, unlike reward and judge) is used by no
training: it is the second feature space of the evaluation and the image side of the alignment reward.
Loss: symmetric cross-entropy over the batch, where pairs with the same caption are positives of one another
(many captions of a small vocabulary coincide; CLIP's plain loss would call them negatives).
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModelWithProjection

from medviz.domains import get_domain
from train import seeding
from train.ahead import Ahead
from train.config import StageConfig, parse
from train.datasets.latents import dihedral, to_pixels
from train.datasets.split import Split, open_split
from train.loop import fit
from train.tokenizer import build_tokenizer


@dataclass
class ContrastiveConfig(StageConfig):
    """Options of the contrastive stage."""

    domain: str = "dermatology"
    size_px: int = 128
    max_length: int = 48
    """Tokens of a padded prompt, start and end included."""
    corpus: int = 20000
    """Captions the tokenizer is trained on."""
    text_width: int = 256
    text_layers: int = 3
    image_width: int = 192
    image_layers: int = 6
    patch_px: int = 16
    projection: int = 128
    batch: int = 48
    """Image-caption pairs a step."""
    learning_rate: float = 5e-4
    warmup: int = 50
    orientations: int = 8
    """Dihedral elements an image may be shown in: 8 for skin, 1 for a chest, which has a left and a right."""


def soft_contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor, captions: list[str]
) -> torch.Tensor:
    """Symmetric cross-entropy of unit embeddings (B, D) with equal captions sharing the target. A scalar."""
    logits = scale * image_embeds @ text_embeds.T
    same = torch.tensor([[a == b for b in captions] for a in captions], dtype=logits.dtype, device=logits.device)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ContrastiveLearner:
    """Learns a CLIPModel on the captions a domain writes for its records."""

    def __init__(self, config: ContrastiveConfig, train: Split, validation: Split) -> None:
        self.config, self.train, self.validation = config, train, validation
        self.domain = get_domain(config.domain)
        self.images = train.images(config.size_px)
        self.tokenizer = build_tokenizer(self.domain.corpus(config.corpus, seed=config.seed), config.max_length)
        torch.manual_seed(seeding.key(config.seed, "contrastive", "weights"))
        text = {
            "vocab_size": len(self.tokenizer),
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": 4,
            "max_position_embeddings": config.max_length,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "projection_dim": config.projection,
        }
        vision = {
            "hidden_size": config.image_width,
            "intermediate_size": 4 * config.image_width,
            "num_hidden_layers": config.image_layers,
            "num_attention_heads": config.image_width // 64,
            "image_size": config.size_px,
            "patch_size": config.patch_px,
            "projection_dim": config.projection,
        }
        clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection)
        self.clip = CLIPModel(clip).to(config.device)
        self.optimizer = torch.optim.AdamW(
            self.clip.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
        )
        self.schedule = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
        )
        self.batches = Ahead(self.batch, config.steps, config.workers, config.device)

    def _loss(
        self, images: np.ndarray | torch.Tensor, captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(
            self.config.device
        )
        output = self.clip(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=to_pixels(images, self.config.device),
        )
        loss = soft_contrastive_loss(
            output.image_embeds, output.text_embeds, self.clip.logit_scale.exp().clamp(max=100), captions
        )
        return loss, output.image_embeds, output.text_embeds

    def batch(self, step: int) -> tuple[torch.Tensor, list[str]]:
        """Images of `step`, uint8 (B, S, S, 3), and their captions."""
        config, images, captions = self.config, [], []
        chosen = seeding.batch_indices(len(self.train), config.batch, step, config.seed, "contrastive")
        for j, i in enumerate(chosen):
            key = seeding.key(config.seed, "contrastive", "view", step * config.batch + j)
            captions.append(self.domain.caption(self.train.records[i], random.Random(key)))
            images.append(dihedral(torch.from_numpy(self.images[i]), key % config.orientations))
        return torch.stack(images), captions

    def update(self, step: int) -> dict[str, float | torch.Tensor]:
        loss, _, _ = self._loss(*self.batches(step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return {"loss": loss.detach(), "grad_norm": norm}

    def state(self) -> dict[str, Any]:
        return {
            "clip": self.clip.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.clip.load_state_dict(state["clip"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def export(self, folder: Path) -> dict[str, Any]:
        """Write tokenizer/, text_encoder/, features/ and alignment/; return the validation loss and its chance level.

        alignment/ is the whole model with its tokenizer, both projections included, for the alignment reward.
        """
        self.clip.eval()
        captions = [self.domain.caption(r, random.Random(i)) for i, r in enumerate(self.validation.records)]
        losses, size = [], self.config.batch
        images = self.validation.images(self.config.size_px)
        with torch.inference_mode():
            for start in range(0, len(images) - size + 1, size):
                losses.append(self._loss(images[start : start + size], captions[start : start + size])[0].item())
        self.tokenizer.save_pretrained(folder / "tokenizer")
        text_encoder = CLIPTextModel(self.clip.config.text_config)
        text_encoder.load_state_dict(_without_prefix(self.clip.state_dict(), text_encoder.state_dict(), "text_model."))
        text_encoder.save_pretrained(folder / "text_encoder")
        features = CLIPVisionModelWithProjection(self.clip.config.vision_config)
        features.load_state_dict(_without_prefix(self.clip.state_dict(), features.state_dict(), ""))
        features.save_pretrained(folder / "features")
        self.clip.save_pretrained(folder / "alignment")
        self.tokenizer.save_pretrained(folder / "alignment")
        mean = float(np.mean(losses)) if losses else None
        return {
            "validation_loss": mean,
            "chance_loss": float(np.log(size)),
            "n": len(losses) * size,
            "vocabulary": len(self.tokenizer),
        }


def _without_prefix(
    source: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """The tensors of a CLIPModel that one half needs, whether or not that half's class nests them under `prefix`."""
    return {name: source[name] if name in source else source[prefix + name] for name in wanted}


def main(arguments: list[str]) -> None:
    """`python -m train contrastive RECIPE [overrides]`."""
    config = parse(arguments, ContrastiveConfig)
    fit(ContrastiveLearner(config, open_split(config.domain, "train"), open_split(config.domain, "validation")), config)
