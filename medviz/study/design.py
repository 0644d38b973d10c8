"""Drawing up a protocol: prompts balanced over strata, their pairs of images, and the user's own real images."""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medviz.domains import Domain, get_domain
from medviz.errors import InputError, StudyError
from medviz.study.pictures import find_real_images, plain_png
from medviz.study.protocol import (
    MIN_CASES,
    PHASES,
    PROTOCOL_NAME,
    Case,
    Picture,
    Protocol,
    RealImage,
    write_protocol,
)
from medviz.study.texts import CLOSING, CONSENT, TASKS

if TYPE_CHECKING:
    from PIL import Image

PRACTICE_PAIRS = 2
PRACTICE_REAL = 2
_MAX_TRIES = 5000  # records drawn for one prompt
_UNDRAWN = Picture("undrawn", "0" * 64)

Draw = Callable[[Sequence[str], Sequence[int], str | None], "list[Image.Image]"]
"""(prompts, seeds, adapter; None is the baseline) -> unlabelled images, as `Studio.generate` draws them."""


def stratified_prompts(domain: Domain, count: int, seed: int) -> list[tuple[str, str]]:
    """Return `count` different (stratum, prompt) in canonical wording: a prompt for each head in turn that asks for it.

    A function of its arguments. Raises InputError where a head's prompts are used up.
    """
    rng = random.Random(f"{domain.name} study {seed}")
    found: dict[str, str] = {}
    for head in islice(cycle(domain.heads), count):
        for _ in range(_MAX_TRIES):
            prompt = _prompt(domain, rng)
            if prompt and prompt not in found and domain.parse(prompt).targets.get(head.name) == 1.0:
                found[prompt] = head.name
                break
        else:
            raise InputError(f"{domain.name} has too few different prompts for {head.name!r}; ask for fewer cases")
    return [(stratum, prompt) for prompt, stratum in found.items()]


def _prompt(domain: Domain, rng: random.Random) -> str | None:
    """A prompt in canonical wording, or None where the record drawn has none."""
    try:
        return domain.build_prompt(domain.parse(domain.caption(domain.invented_record(rng), rng)).values)
    except InputError:
        return None


def draw_up(
    folder: Path,
    domain: str,
    draw: Draw,
    *,
    adapter: str,
    models: Mapping[str, Any],
    cases: int,
    seed: int,
    phases: Sequence[str] = PHASES,
    real_folder: Path | None = None,
    title: str = "",
    repeat_share: float = 0.1,
    rating_margin: float = 0.5,
    auc_margin: float = 0.1,
) -> Protocol:
    """Draw every pair, write the images and the frozen protocol into `folder`, and return the protocol.

    draw: draws images, whose side becomes the study's. adapter: the aligned model's name. models: what is written of
    the models. seed: of prompts and noise. real_folder: the user's own images; without it, leave out "detection". The
    other arguments are fields of Protocol. Raises InputError and StudyError as Protocol and write_protocol.
    """
    chosen = get_domain(domain)
    unknown = sorted(set(phases) - set(TASKS))
    if unknown:
        raise InputError(f"unknown phases {', '.join(unknown)}; allowed: {', '.join(PHASES)}")
    if (folder / PROTOCOL_NAME).exists():
        raise StudyError(f"{folder} holds a protocol already; choose another folder")
    prompts = stratified_prompts(chosen, cases + PRACTICE_PAIRS, seed)
    seeds = [_noise_seed(seed, number) for number in range(len(prompts))]
    texts = [prompt for _, prompt in prompts]
    # One image first, and a protocol without images: what is wrong is found before the long work.
    size_px = min(draw(texts[:1], seeds[:1], adapter)[0].size)
    practice_real, real = _real_images(real_folder, size_px, seed)
    planned = [
        Case(f"c{number:03d}", stratum, prompt, noise, adapter, _UNDRAWN, _UNDRAWN)
        for number, ((stratum, prompt), noise) in enumerate(zip(prompts, seeds, strict=True), 1)
    ]
    protocol = Protocol(
        title=title or f"Reader study, {chosen.label}",
        domain=domain,
        seed=seed,
        size_px=size_px,
        tasks=tuple(TASKS[phase] for phase in PHASES if phase in phases),
        cases=tuple(planned[:cases]),
        practice=tuple(planned[cases:]),
        real=real,
        practice_real=practice_real,
        models=dict(models),
        consent=CONSENT,
        closing=CLOSING,
        repeat_share=repeat_share,
        rating_margin=rating_margin,
        auc_margin=auc_margin,
    )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    baseline, aligned = (
        [_write(folder, image, size_px) for image in draw(texts, seeds, name)] for name in (None, adapter)
    )
    drawn = [
        replace(case, baseline=first, aligned=second)
        for case, first, second in zip(planned, baseline, aligned, strict=True)
    ]
    protocol = replace(protocol, cases=tuple(drawn[:cases]), practice=tuple(drawn[cases:]))
    write_protocol(protocol, folder)
    return protocol


def _real_images(folder: Path | None, size_px: int, seed: int) -> tuple[tuple[RealImage, ...], tuple[RealImage, ...]]:
    """(practice, the others): which are practice is a matter of the seed."""
    if folder is None:
        return (), ()
    found = sorted(
        find_real_images(folder, size_px),
        key=lambda image: hashlib.sha256(f"{seed}/{image.sha256}/{image.name}".encode()).digest(),
    )
    count = PRACTICE_REAL if len(found) >= MIN_CASES + PRACTICE_REAL else 0
    return tuple(found[:count]), tuple(found[count:])


def _noise_seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"study noise {seed}/{number}".encode()).digest()[:4], "big")


def _write(folder: Path, image: "Image.Image", size_px: int) -> Picture:
    content = plain_png(image, size_px)
    sha256 = hashlib.sha256(content).hexdigest()
    name = f"images/{sha256}.png"
    (folder / name).write_bytes(content)
    return Picture(name, sha256)
