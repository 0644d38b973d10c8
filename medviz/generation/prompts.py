"""Prompts as the UNet reads them, with what guidance needs beside them.

Shapes: B images, L context tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from medviz.errors import InputError
from medviz.generation.guidance import SemanticGuidance

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Contrasts:
    """What semantic guidance goes along in K of a batch's B samples: `rows` int64 (K,), ascending, names them.

    named, unnamed (K, L, D): embeddings of `SemanticGuidance.contrast`. own bool (K,), on the CPU: whether the first is
    the sample's prompt as it stands, so that its prediction is there already.
    """

    rows: torch.Tensor
    named: torch.Tensor
    unnamed: torch.Tensor
    own: torch.Tensor

    def take(self, chosen: torch.Tensor, count: int) -> Contrasts:
        """Those of the samples `chosen` (N,) of `count`, which may repeat, as rows of a batch of N."""
        place = torch.full((count,), -1, device=self.rows.device)
        place[self.rows] = torch.arange(len(self.rows), device=self.rows.device)
        found = place[chosen]
        rows = (found >= 0).nonzero()[:, 0]
        kept = found[rows]
        return Contrasts(rows, self.named[kept], self.unnamed[kept], self.own[kept.cpu()])


@dataclass(frozen=True)
class PromptEmbeds:
    """Text embeddings of a batch: `cond` (B, L, D) of the prompts, `uncond` (B, L, D) of the empty prompt.

    contrasts: of the samples that semantic guidance concerns; None where it was not asked for.
    """

    cond: torch.Tensor
    uncond: torch.Tensor
    contrasts: Contrasts | None = None

    def __post_init__(self) -> None:
        if self.cond.shape != self.uncond.shape or self.cond.ndim != 3:
            raise InputError(
                "prompt embeddings must both be (B, L, D), "
                f"found cond {tuple(self.cond.shape)} and uncond {tuple(self.uncond.shape)}"
            )

    def take(self, chosen: torch.Tensor) -> PromptEmbeds:
        """The embeddings of the samples `chosen` int64 (N,), which may repeat."""
        contrasts = self.contrasts and self.contrasts.take(chosen, len(self.cond))
        return PromptEmbeds(self.cond[chosen], self.uncond[chosen], contrasts)


def in_turn(encoded: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """One batch out of several encodings of it, in which every prompt stands as many times in a row: row i of the i-th
    encoding, over and over."""

    def pick(parts: list[torch.Tensor]) -> torch.Tensor:
        row = torch.arange(len(parts[0]), device=parts[0].device)
        return torch.stack(parts)[row % len(parts), row]

    first = encoded[0]
    if len(encoded) == 1:
        return first
    contrasts = first.contrasts
    if contrasts is not None:
        several = [each.contrasts for each in encoded if each.contrasts is not None]
        contrasts = replace(
            contrasts,
            named=pick([each.named for each in several]),
            unnamed=pick([each.unnamed for each in several]),
        )
    return PromptEmbeds(pick([each.cond for each in encoded]), pick([each.uncond for each in encoded]), contrasts)


def _encode(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """Last hidden state (B, L, D) of the text encoder, L the tokenizer's own maximum length."""
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(text_encoder.device)
    return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask)[0]


def encode_prompts(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], semantic: SemanticGuidance | None = None
) -> PromptEmbeds:
    """Encodes the prompts and the empty prompt, padded to `pipeline.tokenizer.model_max_length`; for `semantic`, also
    the two prompts that it goes between, where one of the prompts asks for that.

    Tokens beyond that length are cut; `medviz.grounding.words.truncated_text` tells which.
    No gradient; the result is an ordinary tensor, so a training step may use it.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise InputError(f"prompts must be a list of at least one text, found {prompts!r}")
    # A reinforcement-learning batch repeats few prompts many times: each text is encoded once.
    between = {text: semantic.contrast(text) for text in dict.fromkeys(prompts)} if semantic else {}
    pairs = [(row, *pair) for row, text in enumerate(prompts) if (pair := between.get(text))]
    texts = [*prompts, "", *(text for _, named, unnamed in pairs for text in (named, unnamed))]
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    with torch.no_grad():
        embeds = _encode(pipeline, list(rows))
    cond = embeds[[rows[text] for text in prompts]]
    contrasts = None
    if semantic:
        contrasts = Contrasts(
            torch.tensor([row for row, _, _ in pairs], dtype=torch.long, device=embeds.device),
            embeds[[rows[named] for _, named, _ in pairs]],
            embeds[[rows[unnamed] for _, _, unnamed in pairs]],
            torch.tensor([prompts[row] == named for row, named, _ in pairs], dtype=torch.bool),
        )
    return PromptEmbeds(cond=cond, uncond=embeds[rows[""]].expand_as(cond), contrasts=contrasts)
