"""`python -m train STAGE RECIPE [overrides]`: the one door to every training stage."""

import importlib
import logging
import sys

from medviz.errors import MedvizError
from train import processes, shipping

STAGES = {
    "autoencoder": ("train.autoencoder", "images to latents and back"),
    "contrastive": ("train.contrastive", "tokenizer, text encoder and feature network from image-caption pairs"),
    "diffusion": ("train.diffusion", "the text-conditioned generator"),
    "finish": ("train.finish", "a decoder that gives a generator's own pictures the texture of real ones"),
    "distil": ("train.distil", "an adapter that draws in a few steps"),
    "classifier": ("train.classifier", "reward or judge network"),
    "segmenter": ("train.segmenter", "anatomy: lesion or lungs"),
    "evidence": ("train.evidence", "detectors that mark what they see, from counterfactual pairs"),
    "anatomy_prompts": ("train.anatomy_prompts", "words of places learn to look at their place"),
    "rl": ("train.rl.trainer", "align the generator by reinforcement learning"),
    "spectrum": ("train.spectrum", "gains that give pictures the power spectrum of real images"),
    "evaluate": (
        "train.evaluate",
        "fidelity, alignment, diversity, memorisation; `evaluate grounding`: where phrases look; `evaluate placement`",
    ),
    "choose": ("train.evaluate.choose", "guidance scale and share of an adapter, on validation captions"),
    "choices": ("train.experiments.choices", "ways of training the generator side by side, at one compute"),
    "curve": ("train.experiments.curve", "distance from real images against the compute of training"),
    "methods": ("train.experiments.methods", "reinforcement learning methods side by side, at one budget"),
    "augmentation": ("train.experiments.augmentation", "does a classifier learn from synthetic pictures?"),
    "anatomy_variants": ("train.experiments.anatomy_variants", "ways of tuning words to anatomy, side by side"),
    "bench": ("train.benchmarks", "side-by-side measurements"),
    "counterfactuals": ("train.evaluate.counterfactual_sheet", "contact sheet of images with and without an addition"),
    "prepare": ("train.datasets.prepare", "parquet shards from the publishers' folders"),
    "assemble": ("train.assemble", "collect trained parts into assets/models/DOMAIN with its manifest"),
    "restore": ("train.restore", "the runs of a model folder, to go on from what ships"),
    "examples": ("train.examples", "stored pairs for the app's first screen, from the assembled models"),
    "report": ("train.evaluate.report", "tables of README and About from assets/reports"),
}

SHARED = {"diffusion", "rl"}
"""Stages that several processes may run as one, see `train.processes`."""


def usage() -> str:
    """The stages, a line each."""
    lines = [f"  {name:15s} {text}" for name, (_, text) in STAGES.items()]
    return (
        "usage: python -m train STAGE RECIPE [--option value ...]\n\nstages:\n"
        + "\n".join(lines)
        + "\n\n`python -m train STAGE RECIPE --help` lists a stage's options.\n"
        f"Without {shipping.OPTION}, what is meant for assets/ or README.md goes to {shipping.BESIDE}/."
    )


def main(arguments: list[str]) -> int:
    """Run one stage; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        return 0 if arguments else 2
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    stage, rest = arguments[0], shipping.take_option(arguments[1:])
    if stage not in STAGES:
        sys.stderr.write(f"no stage {stage!r}; stages are {', '.join(STAGES)}\n")
        return 2
    try:
        if stage not in SHARED:
            processes.refuse_several(stage)
        importlib.import_module(STAGES[stage][0]).main(rest)
    except MedvizError as error:
        sys.stderr.write(f"{stage}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
