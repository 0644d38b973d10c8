"""The prompts that are trained on: the domain's own and invented ones, each with what a reward can check of it."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from medviz.domains.base import Domain, ParsedPrompt
from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.generation.prompts import PromptEmbeds, encode_prompts
from train import seeding

TRIES = 50


@dataclass(frozen=True)
class PromptTable:
    """P prompts, what each asks for, and their embeddings."""

    prompts: tuple[str, ...]
    parsed: tuple[ParsedPrompt, ...]
    encoded: PromptEmbeds

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.encoded.cond.device

    def embeds(self, prompt_ids: np.ndarray) -> PromptEmbeds:
        """The embeddings of the prompts with these ids, (B, L, D) each."""
        return self.encoded.take(torch.as_tensor(np.asarray(prompt_ids), device=self.device))


def prompt_table(
    pipeline: StableDiffusionPipeline, domain: Domain, prompts: Iterable[str], guidance: Guidance
) -> PromptTable:
    """The table of `prompts`. Raises InputError for one that decides no attribute: nothing could reward it."""
    table = any_prompt_table(pipeline, domain, list(prompts), guidance)
    mute = [p.prompt for p in table.parsed if not p.targets]
    if mute:
        raise InputError(
            f"{len(mute)} of {len(table.prompts)} prompts ask for nothing a reward can check, e.g. {mute[0]!r}"
        )
    return table


def any_prompt_table(
    pipeline: StableDiffusionPipeline, domain: Domain, prompts: Sequence[str], guidance: Guidance
) -> PromptTable:
    """The table of `prompts` that are only drawn, at `guidance`: what they ask for need not be anything a reward can
    check."""
    embeds = encode_prompts(pipeline, list(prompts), guidance.semantic)
    return PromptTable(tuple(prompts), tuple(domain.parse(p) for p in prompts), embeds)


def invented_prompts(domain: Domain, count: int, seed: int) -> list[str]:
    """`count` different captions of records that no patient stands behind, each asking for what a reward can check.

    None is one of the domain's validation prompts. Raises InputError when the grammar does not give so many.
    """
    rng = random.Random(seeding.key(seed, "rl", "invented prompts"))
    known, found = set(domain.validation_prompts()), dict[str, None]()
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        caption = domain.caption(domain.invented_record(rng), rng)
        if caption not in known and domain.parse(caption).targets:
            found[caption] = None
    if len(found) < count:
        raise InputError(
            f"the grammar of {domain.name} gave {len(found)} of {count} different prompts that can be rewarded"
        )
    return list(found)
