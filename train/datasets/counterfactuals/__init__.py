"""Counterfactual images: the same image with and without one addition, drawn by two families of code."""

from collections.abc import Callable

from medviz.errors import InputError
from train.datasets.counterfactuals import family_a, family_b
from train.datasets.counterfactuals.base import Counterfactual, Family, relit
from train.datasets.counterfactuals.chest_a import ChestFindingsA
from train.datasets.counterfactuals.chest_b import ChestFindingsB
from train.datasets.counterfactuals.dermatology import ArtefactFamily

__all__ = ["FAMILIES", "Counterfactual", "Family", "family", "relit"]

FAMILIES: dict[tuple[str, str], Callable[[], Family]] = {
    ("dermatology", "a"): lambda: ArtefactFamily("a", family_a.PAINTERS, thirds=(0, 1), half=0),
    ("dermatology", "b"): lambda: ArtefactFamily("b", family_b.PAINTERS, thirds=(2,), half=1),
    ("radiology", "a"): ChestFindingsA,
    ("radiology", "b"): ChestFindingsB,
}
"""(domain, name) -> what makes the family."""


def family(domain: str, name: str) -> Family:
    """The family `name` of `domain`. Raises InputError naming the families there are."""
    if (domain, name) not in FAMILIES:
        known = ", ".join(f"{domain} {name}" for domain, name in FAMILIES)
        raise InputError(f"no family {name!r} of {domain!r}; there are {known}")
    return FAMILIES[domain, name]()
