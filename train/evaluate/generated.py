"""The images that an evaluation judges: made once, kept on disk batch by batch, read by every metric.

A run that was stopped goes on where it was, and a change of any weight, prompt, seed or setting asks for new images:
the folder's name is the hash of everything that the pixels depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from medviz.generation.guidance import Guidance
from medviz.generation.plan import FewSteps
from medviz.generation.sampling import decode, sample
from medviz.generation.spectrum import Spectra, Spectrum
from medviz.models.adapters import using_adapter
from medviz.models.manifest import FileRecord, Manifest, hash_file
from train.seeding import key

DRAWN_BY = ("unet/", "text_encoder/", "tokenizer/", "scheduler/", "model_index.json")
GENERATOR_PARTS = (*DRAWN_BY, "vae/")


@dataclass(frozen=True)
class Request:
    """N images to draw: prompts and seeds, one of each an image, and the sampler's settings."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float | Guidance

    def __len__(self) -> int:
        return len(self.prompts)


def grid_request(
    prompts: Sequence[str], seeds_per_prompt: int, steps: int, guidance_scale: float | Guidance
) -> Request:
    """Every prompt with the same seeds 0, 1, ...: prompt-major, so rows [i * k, (i + 1) * k) are prompt i's."""
    return Request(
        prompts=tuple(prompt for prompt in prompts for _ in range(seeds_per_prompt)),
        seeds=tuple(range(seeds_per_prompt)) * len(prompts),
        steps=steps,
        guidance_scale=guidance_scale,
    )


def caption_request(captions: Sequence[str], seed: int, steps: int, guidance_scale: float | Guidance) -> Request:
    """One image a caption, each from a seed of its own that is a function of (seed, position)."""
    seeds = tuple(key(seed, "evaluate", "caption", index) % 2**32 for index in range(len(captions)))
    return Request(prompts=tuple(captions), seeds=seeds, steps=steps, guidance_scale=guidance_scale)


def few_steps_of(manifest: Manifest, steps: int, guidance: float | Guidance) -> FewSteps | None:
    """How the few-step adapter of a model folder has part in a picture."""
    return FewSteps.of(manifest, steps, guidance.scale if isinstance(guidance, Guidance) else guidance)


def told(manifest: Manifest, steps: int, guidance: float | Guidance) -> str:
    """How a model folder draws at that guidance, in words: two that draw alike say the same."""
    few_steps = few_steps_of(manifest, steps, guidance)
    joined = "," if few_steps and few_steps.lead else ""
    folded = f"{joined} folded into {few_steps}" if few_steps else ""
    spectrum = Spectra.of_manifest(manifest).of(few_steps)
    return f"{guidance}{folded}{f', spectrum {spectrum}' if spectrum else ''}"


def file_records(folder: Path, prefix: str = "") -> dict[str, FileRecord]:
    """Name below `prefix` -> size and sha256 of every file in `folder`, as a manifest lists them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}{path.relative_to(folder).as_posix()}": hash_file(path) for path in paths}


def weights_digest(files: Mapping[str, FileRecord], *adapters: str | None) -> str:
    """sha256 over the names and hashes of the files that an image depends on: the pipeline's, and its adapters'.

    The judge, the reward and other adapters leave it unchanged.
    """
    return _digest(files, (*GENERATOR_PARTS, *_adapter_parts(adapters)))


def _adapter_parts(adapters: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(f"adapters/{name}/" for name in adapters if name is not None)


def eyes_digest(files: Mapping[str, FileRecord]) -> str:
    """sha256 over names and hashes of the networks that look at pictures: the judge and the second feature space."""
    return _digest(files, ("judge/", "features/"))


def rests_on(
    files: Mapping[str, FileRecord],
    eyes: Mapping[str, FileRecord],
    rows: Mapping[str, str | None],
    few_steps: FewSteps | None,
) -> dict[str, Any]:
    """sha256 of what the figures of an evaluation rest on: the weights that drew each row (its adapter, None for none),
    the eyes that looked and the reward. An adapter that is not among them changes nothing."""
    also = few_steps.adapter if few_steps else None
    return {
        "eyes": eyes_digest(eyes),
        "reward": _digest(files, ("rewards/",)),
        "weights": {row: weights_digest(files, adapter, also) for row, adapter in rows.items()},
    }


def _digest(files: Mapping[str, FileRecord], parts: tuple[str, ...]) -> str:
    lines = [f"{name} {record.sha256}" for name, record in sorted(files.items()) if name.startswith(parts)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def generate(
    pipeline: StableDiffusionPipeline,
    files: Mapping[str, FileRecord],
    adapter: str | None,
    request: Request,
    folder: Path,
    *,
    batch: int,
    label: str = "images",
    few_steps: FewSteps | None = None,
    spectrum: Spectrum | None = None,
) -> np.ndarray:
    """Images of a request as uint8 (N, H, W, 3), drawn in batches of `batch`; batches found in `folder` are read.

    adapter: a name, or None for the baseline; few_steps, spectrum: see `medviz.generation.sampling.sample`. The image
    of a prompt and seed is the same whichever batch it is in, up to the float error of a matrix product of another
    size. Latents are kept as well: another decoder or spectrum takes no drawing.
    """
    identity = _identity(pipeline, request, adapter, batch, few_steps)
    identity["weights"] = weights_digest(files, adapter, few_steps.adapter if few_steps else None)
    if spectrum:
        identity["spectrum"] = spectrum.as_json()
    place = _place(folder, identity)
    parts = []
    batches = generate_latents(pipeline, files, adapter, request, folder, batch=batch, label=label, few_steps=few_steps)
    for number, latents in enumerate(batches):
        path = place / f"images-{number * batch:06d}.npz"
        if not path.is_file():
            drawn = latents()
            images = _to_uint8(decode(pipeline, spectrum(drawn) if spectrum else drawn))
            _write(path, partial(np.savez_compressed, images=images))
        with np.load(path) as stored:
            parts.append(stored["images"])
    return np.concatenate(parts)


def generate_latents(
    pipeline: StableDiffusionPipeline,
    files: Mapping[str, FileRecord],
    adapter: str | None,
    request: Request,
    folder: Path,
    *,
    batch: int,
    label: str = "latents",
    few_steps: FewSteps | None = None,
) -> Iterator[Callable[[], torch.Tensor]]:
    """For each batch of a request a function that gives its latents (B, C, h, w), float32, before any spectrum: those
    found in `folder` are read, others drawn. Arguments as for `generate`."""
    identity = _identity(pipeline, request, adapter, batch, few_steps)
    also = few_steps.adapter if few_steps else None
    identity["drawn_by"] = _digest(files, (*DRAWN_BY, *_adapter_parts((adapter, also))))
    place = _place(folder / "latents", identity)

    def latents(start: int) -> torch.Tensor:
        path = place / f"latents-{start:06d}.npy"
        if not path.is_file():
            rows = slice(start, start + batch)
            with using_adapter(pipeline.unet, adapter):
                drawn = sample(
                    pipeline,
                    request.prompts[rows],
                    request.seeds[rows],
                    steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    few_steps=few_steps,
                )
            _write(path, partial(np.save, arr=drawn.cpu().numpy()))
        return torch.from_numpy(np.load(path)).to(pipeline.device)

    with tqdm(total=len(request), unit="image", desc=label) as bar:
        for start in range(0, len(request), batch):
            yield partial(latents, start)
            bar.update(min(batch, len(request) - start))


def _identity(
    pipeline: StableDiffusionPipeline, request: Request, adapter: str | None, batch: int, few_steps: FewSteps | None
) -> dict[str, Any]:
    """What latents depend on beside weights."""
    identity = {"adapter": adapter, "batch": batch, **asdict(request, dict_factory=_said)}
    identity["dtype"] = str(next(pipeline.unet.parameters()).dtype)
    if few_steps:
        identity["few_steps"] = asdict(few_steps, dict_factory=_said)
    return identity


def _place(folder: Path, identity: Mapping[str, Any]) -> Path:
    place = folder / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    (place / "request.json").write_text(json.dumps(identity, indent=1))
    return place


def _said(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dataclass's fields but for those that are None: an option that came later changes no name of before."""
    return {name: value for name, value in items if value is not None}


def _to_uint8(images: torch.Tensor) -> np.ndarray:
    levels = ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    # Renamed when whole: a batch that a stop cut short must not be read as one.
    writing = path.with_name(f".writing-{path.name}")
    with writing.open("wb") as stream:
        write(stream)
    os.replace(writing, path)
