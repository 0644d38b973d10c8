"""The stages of training: command -> module whose `main` runs it, and what it does in a line."""

STAGES = {
    "run": ("train.chain", "all stages of a domain in their order, from images to a model folder"),
    "autoencoder": ("train.autoencoder", "images to latents and back"),
    "contrastive": ("train.contrastive", "tokenizer, text encoder and feature network from image-caption pairs"),
    "diffusion": ("train.diffusion", "the text-conditioned generator"),
    "distil": ("train.distil", "an adapter that draws in a few steps"),
    "classifier": ("train.classifier", "reward or judge network"),
    "segmenter": ("train.segmenter", "anatomy: lesion or lungs"),
    "evidence": ("train.evidence", "detectors that mark what they see, from counterfactual pairs"),
    "anatomy_prompts": ("train.anatomy_prompts", "words of places learn to look at their place"),
    "rl": ("train.rl.trainer", "align the generator by reinforcement learning"),
    "spectrum": ("train.spectrum", "gains that bring the power spectrum of few-step pictures to that of many steps"),
    "evaluate": (
        "train.evaluate",
        "fidelity, alignment, diversity, memorisation; `evaluate grounding`: where phrases look; `evaluate placement`",
    ),
    "choose": ("train.evaluate.choose", "guidance scale and share of an adapter, on validation captions"),
    "methods": ("train.experiments.methods", "reinforcement learning methods side by side, at one budget"),
    "augmentation": ("train.experiments.augmentation", "does a classifier learn from synthetic pictures?"),
    "bench": ("train.benchmarks", "side-by-side measurements"),
    "watermark": ("train.evaluate.watermark", "how often the watermark is read, found by mistake, and what it changes"),
    "counterfactuals": ("train.evaluate.counterfactual_sheet", "contact sheet of images with and without an addition"),
    "prepare": ("train.datasets.prepare", "parquet shards from the publishers' folders"),
    "assemble": ("train.assemble", "collect trained parts into assets/models/DOMAIN with its manifest"),
    "restore": ("train.restore", "the runs of a model folder, to go on from what ships"),
    "examples": ("train.examples", "stored pairs for the app's first screen, from the assembled models"),
    "report": ("train.evaluate.report", "tables of README and About from assets/reports"),
}

SHARED = {"diffusion", "rl"}
"""Stages that several processes may run as one, see `train.processes`."""
