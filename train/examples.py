"""Draw every domain's example prompts with the embedded models, for the app's first screen."""

import logging
import shutil
from pathlib import Path

from medviz import Studio
from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.export.examples import write_example
from train import shipping

logger = logging.getLogger(__name__)


def write_examples(studio: Studio, domain: str, folder: Path) -> list[Path]:
    """Write one stored example for each example prompt of `domain` to folder/NN, in the domain's order.

    What lay in `folder` goes: an example shows the models that ship, not those before them.
    """
    if folder.is_dir():
        shutil.rmtree(folder)
    places = []
    for number, example in enumerate(get_domain(domain).examples, start=1):
        pair = studio.compare(domain, example.prompt, example.seed)
        places.append(write_example(pair, folder / f"{number:02d}"))
        logger.info("%s: %s", places[-1], example.prompt)
    return places


def main(arguments: list[str]) -> None:
    """`python -m train examples [DOMAIN ...] [--ship]`; without a name, every domain that has models."""
    studio = Studio()
    domains = arguments or list(studio.domains())
    unknown = sorted(set(domains) - set(studio.domains()))
    if unknown:
        raise InputError(f"no models for {unknown}; domains with models are {list(studio.domains())}")
    for domain in domains:
        write_examples(studio, domain, shipping.place(studio.assets / "examples" / domain))
