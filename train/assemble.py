"""Collect what the stages made into assets/models/DOMAIN, with the manifest and the model card written from it."""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medviz.errors import InputError
from medviz.generation.guidance import SEMANTIC_INTERVAL, Guidance
from medviz.models.adapters import load_lora
from medviz.models.card import write_card
from medviz.models.manifest import write_manifest
from train import shipping
from train.datasets.latents import check_same_encoder
from train.pipeline_configs import drop_unknown_options, load_in_fp32

SOURCES: dict[str, list[dict[str, str]]] = {
    "dermatology": [
        {
            "source": "HAM10000",
            "licence": "CC BY-NC-SA 4.0",
            "citation": "Tschandl, Rosendahl, Kittler 2018, doi 10.1038/sdata.2018.161",
        },
        {
            "source": "ISIC 2018 Task 1-2",
            "licence": "non-commercial use with attribution",
            "citation": "Codella et al. 2018, arXiv 1902.03368",
        },
        {
            "source": "artefact annotations",
            "licence": "research use with attribution",
            "citation": "Bissoto, Valle, Avila 2020, Debiasing skin lesion datasets and models? Not so fast",
        },
        {
            "source": "artefact labels of the RL4Med-DDPO splits",
            "licence": "research use with attribution",
            "citation": "Saremi et al. 2025, arXiv 2503.15784",
        },
    ],
    "radiology": [
        {
            "source": "NIH ChestX-ray14",
            "licence": "NIH Clinical Center, unrestricted use with attribution",
            "citation": "Wang et al. 2017, arXiv 1705.02315",
        },
        {
            "source": "Kermany 2018 paediatric",
            "licence": "CC BY 4.0",
            "citation": "Kermany, Zhang, Goldbaum 2018, doi 10.17632/rscbjbr9sj",
        },
        {
            "source": "Hannover COVID-19",
            "licence": "CC BY 3.0",
            "citation": "Winther et al. 2020, COVID-19 image repository, Hannover Medical School",
        },
        {
            "source": "covid-chestxray-dataset",
            "licence": "per image, CC BY-NC-SA 4.0 at the strictest",
            "citation": "Cohen et al. 2020, arXiv 2006.11988",
        },
        {
            "source": "RSNA boxes (wording of prompts)",
            "licence": "not redistributed",
            "citation": "Shih et al. 2019, doi 10.1148/ryai.2019180041",
        },
        {"source": "lung masks by v7labs", "licence": "CC BY 4.0", "citation": "v7labs covid-19-xray-dataset"},
        {
            "source": "lung boxes and segmentations by GeneralBlockchain",
            "licence": "CC BY 4.0",
            "citation": "GeneralBlockchain covid-19-chest-xray-segmentations-dataset",
        },
    ],
}


@dataclass
class Parts:
    """Which run made which part of a domain's model folder; `recipe` files name them."""

    domain: str
    preset: str
    pipeline: str
    autoencoder: str
    """The autoencoder that ships: the pipeline's own, or one whose decoder has learnt on behind the same encoder."""
    features: str
    reward: str
    judge: str
    segmenter: str
    guidance_scale: float
    guidance_interval: tuple[int, int]
    guidance_outside: float
    """What the app and the evaluation draw at: see `medviz.generation.guidance`. Chosen on validation captions."""
    adapters: dict[str, str]
    default_adapter: str | None
    runs: dict[str, str]
    """Stage name to run folder: their metrics.json go into the manifest."""
    semantic_heads: tuple[str, ...] = ()
    semantic_scale: float = 0.0
    semantic_interval: tuple[int, int] = SEMANTIC_INTERVAL
    """Guidance along single words, as above; no head: none."""
    grounding_adapter: str | None = None
    """The adapter that phrases are looked for with in an uploaded image; None: the default one."""
    few_step_semantic_interval: tuple[int, int] | None = None
    """Timesteps between which the few-step adapter is guided along the words; None: what it has learnt is enough."""
    few_step_adapter: str | None = None
    """The adapter that draws in few steps; None: there is none."""
    few_step_finish: int = 0
    """How many of its last steps finish what the generator's own began, where more are asked for; 0: none do."""
    spectrum: str = ""
    """spectra.json of the gains that finished latents go through; empty: they go through none."""
    tells: tuple[str, ...] = ()
    """What gives the pictures away beside real ones, a sentence each, as seen by eye on the sheets."""
    adapter_strengths: dict[str, float] = field(default_factory=dict)
    """Share of an adapter's change of the weights that ships, above 0 and at most 1; unnamed: all of it. Chosen on
    validation images, as the guidance scale is: more pleases the judge, and takes pictures farther from real ones."""

    @property
    def guidance(self) -> Guidance:
        """What the folder's pictures are drawn at. Raises InputError for values out of range."""
        return Guidance.of_recipe(vars(self), self.domain, self.guidance_scale)


def read_parts(path: str) -> Parts:
    """The assembly recipe at `path`. Raises InputError when a key is missing or unknown."""
    content = yaml.safe_load(Path(path).read_text())
    try:
        return Parts(**content)
    except TypeError as error:
        raise InputError(f"the assembly recipe {path} does not fit: {error}") from error


def _copy(source: str, place: Path) -> None:
    if not Path(source).is_dir():
        raise InputError(f"no folder {source}: train that stage first, or drop the part from the assembly recipe")
    if place.exists():
        shutil.rmtree(place)
    shutil.copytree(source, place)


def _halve(folder: Path) -> None:
    """Rewrite the safetensors files below `folder` in bf16: half the size, the precision the models are shipped in."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {"format": "pt"}  # an adapter's holds its configuration
        tensors = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in load_file(path).items()}
        save_file(tensors, path, metadata=metadata)


def _replace_autoencoder(place: Path, source: str) -> None:
    """Put the autoencoder `source` at `place`; InputError when its encoder is not the one the generator learnt on."""
    trained_on, shipped = (AutoencoderTiny.from_pretrained(folder, dtype=torch.bfloat16) for folder in (place, source))
    check_same_encoder(trained_on, shipped, source)
    shutil.rmtree(place)
    shipped.save_pretrained(place)
    drop_unknown_options(place)


def weaken(folder: Path, strength: float) -> None:
    """Multiply the change that the LoRA adapter in `folder` makes by `strength`, and write that into adapter.json,
    its title included.

    Raises InputError for a strength outside (0, 1], and for an adapter that is not LoRA.
    """
    if not 0 < strength <= 1:
        raise InputError(f"an adapter's strength must be above 0 and at most 1, found {strength}")
    weights = list(folder.glob("*.safetensors"))
    for path in weights:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(path)
        outer = [name for name in tensors if ".lora_B." in name]  # the change is B A: one factor takes the strength
        if not outer or len(outer) * 2 != len(tensors):
            raise InputError(f"{path} is no LoRA adapter: only such a one has a strength")
        save_file({n: t * strength if n in outer else t for n, t in tensors.items()}, path, metadata=metadata)
    card = folder / "adapter.json"
    details = json.loads(card.read_text())
    if strength < 1 and "title" in details:
        details["title"] += f", {strength:.0%} of its change"
    card.write_text(json.dumps({**details, "strength": strength}, indent=1, sort_keys=True) + "\n")


def load_weakened(pipeline: StableDiffusionPipeline, folder: str | Path, strength: float, name: str) -> None:
    """Load the LoRA adapter in `folder` as `name`, switched off, with that share of its change; as `weaken` raises."""
    with tempfile.TemporaryDirectory() as aside:
        copied = Path(aside) / "adapter"
        shutil.copytree(folder, copied)
        weaken(copied, strength)
        load_lora(pipeline.unet, copied, name)


def adapter_source(parts: Parts, name: str) -> str:
    """The folder that the adapter `name` comes from. InputError where it holds a whole UNet instead: that would be
    another baseline, not something to switch on over this one."""
    source = parts.adapters[name]
    if (Path(source) / "unet").is_dir():
        raise InputError(f"{source} holds a whole UNet (train_what full): it is a model of its own and no adapter")
    return source


def _check_few_steps(parts: Parts) -> None:
    """Raises InputError when the few-step adapter learnt another guidance than the folder is to have: it would draw
    other pictures than twenty steps do."""
    if parts.few_step_semantic_interval and not (parts.few_step_adapter and parts.semantic_heads):
        raise InputError("few_step_semantic_interval needs a few-step adapter and semantic_heads")
    if parts.few_step_adapter is None:
        if parts.few_step_finish:
            raise InputError("few_step_finish needs a few-step adapter")
        return
    if parts.few_step_adapter not in parts.adapters:
        raise InputError(f"the few-step adapter {parts.few_step_adapter!r} is not among {', '.join(parts.adapters)}")
    recipe = json.loads((Path(adapter_source(parts, parts.few_step_adapter)) / "adapter.json").read_text())["recipe"]
    learnt = Guidance.of_recipe(recipe, parts.domain, 0.0)
    if learnt != parts.guidance:
        raise InputError(
            f"{parts.few_step_adapter!r} learnt the guidance {learnt}; the folder is to have {parts.guidance}"
        )


def _spectra(parts: Parts) -> dict[str, Any]:
    if not parts.spectrum:
        return {}
    path = Path(parts.spectrum)
    if not path.is_file():
        raise InputError(f"{path} is missing: the stage spectrum has not finished")
    return json.loads(path.read_text(encoding="utf-8"))


def assemble(parts: Parts, folder: Path) -> None:
    """Write the model folder `folder` from the parts and describe it in manifest.json and README.md.

    Raises InputError for a part that is missing or does not fit the others.
    """
    _check_few_steps(parts)
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    _copy(parts.pipeline, writing)
    _replace_autoencoder(writing / "vae", parts.autoencoder)
    load_in_fp32(writing / "text_encoder")
    for source, name in (
        (parts.features, "features"),
        (parts.reward, "rewards/attribute"),
        (parts.judge, "judge"),
        (parts.segmenter, "segmenter"),
    ):
        if source:
            _copy(source, writing / name)
            _halve(writing / name)
    for name in parts.adapters:
        _copy(adapter_source(parts, name), writing / "adapters" / name)
        if name in parts.adapter_strengths:
            weaken(writing / "adapters" / name, parts.adapter_strengths[name])
        _halve(writing / "adapters" / name)
    metrics: dict[str, Any] = {}
    for stage, run in parts.runs.items():
        path = Path(run) / "metrics.json"
        if not path.is_file():
            raise InputError(f"{path} is missing: the stage {stage} has not finished")
        metrics[stage] = json.loads(path.read_text())
    write_manifest(
        writing,
        {
            "domain": parts.domain,
            "preset": parts.preset,
            "recipe": {
                **{stage: f"train/recipes/{Path(run).name}.yaml" for stage, run in parts.runs.items()},
                **parts.guidance.as_recipe(),
                **({"few_step_semantic_interval": list(few)} if (few := parts.few_step_semantic_interval) else {}),
                **({"few_step_finish": parts.few_step_finish} if parts.few_step_finish else {}),
                **{f"adapter_strength {name}": strength for name, strength in parts.adapter_strengths.items()},
            },
            "data": SOURCES[parts.domain],
            "training_cost": {
                stage: {"seconds": m.get("trained_s"), "steps": m.get("steps")} for stage, m in metrics.items()
            },
            "seeds": {stage: m.get("seed") for stage, m in metrics.items()},
            "metrics": metrics,
            "default_adapter": parts.default_adapter,
            "grounding_adapter": parts.grounding_adapter,
            "few_step_adapter": parts.few_step_adapter,
            **({"spectra": spectra} if (spectra := _spectra(parts)) else {}),
            "tells": list(parts.tells),
        },
    )
    write_card(writing)
    for path in writing.rglob("*"):  # safetensors makes files that only their owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing.rename(folder)


def main(arguments: list[str]) -> None:
    """`python -m train assemble RECIPE [FOLDER] [--ship]`; FOLDER is assets/models/DOMAIN unless named."""
    if not arguments:
        raise InputError("name the assembly recipe, e.g. train/recipes/assemble-dermatology-cpu.yaml")
    parts = read_parts(arguments[0])
    assemble(parts, shipping.place(arguments[1] if len(arguments) > 1 else f"assets/models/{parts.domain}"))
