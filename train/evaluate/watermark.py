"""`python -m train watermark`: how often the watermark is read, how often it is found where it is not, what it costs.

Read back after JPEG compression on pictures that the embedded models draw, found by mistake on the same pictures and on
held-out real images, and its effect on rewards and judge on the stored examples. Pictures are marked as the archive
marks them: behind the visible label. Scores are of the pictures without the label, as everywhere.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

from medviz import Studio
from medviz.audit.provenance import label, versions
from medviz.audit.watermark import JPEG_QUALITY, THRESHOLD, compressed, embed, score
from medviz.domains import get_domain
from medviz.export.examples import read_examples
from medviz.limits import DEFAULT_STEPS
from train import shipping
from train.datasets.split import open_split
from train.evaluate.statistics import CONFIDENCE, Estimate, mean_interval
from train.experiments.pieces import write_json

QUALITIES = (90, JPEG_QUALITY, 60, 50)
BATCH = 10  # pictures drawn at once
SIDE_PX = 256  # of real images, as the generators learnt from them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatermarkConfig:
    """What is measured, and where the report goes.

    count: pictures drawn for each domain, in as few steps as its few-step adapter takes. real: held-out real images of
    each domain, 0 for none. models: folder of model folders, beside whose folder the examples lie. root: the real
    images' folder, else MEDVIZ_DATA.
    """

    count: int = 100
    real: int = 500
    models: str = "assets/models"
    report: str = "assets/reports/watermark.json"
    root: str | None = None


def proportion(successes: int, n: int) -> Estimate:
    """A share of n units with its exact (Clopper-Pearson) 95 % interval."""
    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, "exact")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def read_back(pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Mark pictures and read them: share read as PNG and at each of QUALITIES, PSNR in dB."""
    marked = [embed(picture) for picture in tqdm(pictures, desc="marked", disable=None)]
    errors = [
        float(np.square(np.asarray(after, np.float64) - np.asarray(before, np.float64)).mean())
        for before, after in zip(pictures, marked, strict=True)
    ]
    files = {"png": marked} | {
        f"jpeg_{quality}": [compressed(each, quality) for each in marked] for quality in QUALITIES
    }
    found = {name: np.array([score(image) for image in images]) for name, images in files.items()}
    return {
        "read": {name: proportion(int((each >= THRESHOLD).sum()), each.size).as_json() for name, each in found.items()},
        "lowest_score": {name: float(each.min()) for name, each in found.items()},
        "psnr_db": mean_interval(10.0 * np.log10(255.0**2 / np.array(errors))).as_json(),
    }


def unmarked(pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Read pictures that carry no mark, as they are and after JPEG compression: share found marked, and the scores."""
    found = np.array(
        [[score(image), score(compressed(image))] for image in tqdm(pictures, desc="unmarked", disable=None)]
    )
    wrong = int((found >= THRESHOLD).any(axis=1).sum())
    return {
        "found_marked": proportion(wrong, len(found)).as_json(),
        "scores": {
            "mean": float(found.mean()),
            "standard_deviation": float(found.std()),
            "highest": float(found.max()),
        },
    }


def effect_on_scores(studio: Studio, domain: str) -> list[dict[str, Any]]:
    """Change of every score by marking the pictures of the stored examples: mean with interval, and the largest."""
    changes: dict[tuple[str, str], list[float]] = {}
    for pair in read_examples(studio.assets / "examples" / domain):
        for drawing in (pair.baseline, pair.aligned):
            before, after = (
                studio.score(domain, image, pair.prompt) for image in (drawing.image, embed(drawing.image))
            )
            for one, other in zip(before, after, strict=True):
                if one.baseline is not None and other.baseline is not None:
                    changes.setdefault((one.role, one.name), []).append(other.baseline - one.baseline)
    return [
        {
            "role": role,
            "name": name,
            "change": mean_interval(np.array(values)).as_json(),
            "largest": float(np.abs(values).max()),
        }
        for (role, name), values in sorted(changes.items())
    ]


def drawn(studio: Studio, domain: str, count: int) -> list[Image.Image]:
    """`count` labelled pictures of the domain's validation prompts, by the aligned model, one seed each."""
    steps = studio.manifest(domain).few_steps or DEFAULT_STEPS
    prompts = get_domain(domain).validation_prompts()
    asked = [prompts[index % len(prompts)] for index in range(count)]
    images: list[Image.Image] = []
    for first in tqdm(range(0, count, BATCH), desc=f"{domain} drawn", disable=None):
        seeds = list(range(first, min(first + BATCH, count)))
        images += studio.generate(domain, asked[first : first + BATCH], seeds, steps=steps, batch_size=BATCH)
    return [label(image) for image in images]


def run(config: WatermarkConfig, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measure and write the report; returns it."""
    studio, domains = Studio(config.models), {}
    for domain in studio.domains():
        pictures = drawn(studio, domain, config.count)
        found = {**read_back(pictures), "unmarked_synthetic": unmarked(pictures), "unmarked_real": None}
        if config.real:
            split = open_split(domain, "test", config.root)
            chosen = np.random.default_rng(0).permutation(len(split))[: config.real]
            found["unmarked_real"] = unmarked([Image.fromarray(split.image(int(i), SIDE_PX)) for i in chosen])
        domains[domain] = {**found, "effect_on_scores": effect_on_scores(studio, domain)}
    report = {
        "report": "watermark",
        "command": shlex.join(["python", "-m", "train", "watermark", *arguments]),
        "threshold": THRESHOLD,
        "seeds": f"pictures: 0 to {config.count - 1}; real images: 0; intervals: 0",
        "intervals": "95 %: exact for shares, bootstrap over pictures for means",
        "models": {domain: studio.manifest(domain).sha256 for domain in domains},
        "versions": versions(),
        "domains": domains,
    }
    path = shipping.place(config.report)
    write_json(path, report)
    logger.info("report in %s", path)
    return report


def main(arguments: list[str]) -> None:
    """`python -m train watermark [--count N] [--real N] [--ship]`."""
    run(tyro.cli(WatermarkConfig, args=arguments, prog="python -m train watermark"), arguments)
