"""How often each training image is drawn."""

import numpy as np

from medviz.domains import get_domain
from medviz.errors import InputError
from train.datasets.split import Split, source_weights

RAKES = 100  # rounds of iterative proportional fitting: each label's share is right to a thousandth long before


def sample_weights(
    split: Split, shares: tuple[str, ...], rarity_power: float, label_shares: tuple[str, ...] = ()
) -> np.ndarray:
    """How often each image is drawn (N,): its source's share times a power of how rare its rarest label is.

    label_shares: then raked until each named label has its share of what is drawn. Raises InputError for shares that
    do not read NAME=SHARE, of labels that no image or every image has, or outside (0, 1).
    """
    weights = source_weights(split, named_shares("source_shares", shares))
    domain = get_domain(split.domain)
    present = [[head for head, value in domain.labels(record).items() if value >= 0.5] for record in split.records]
    counts: dict[str, int] = {}
    for heads in present:
        for head in heads:
            counts[head] = counts.get(head, 0) + 1
    rarest = np.array([min((counts[h] for h in heads), default=len(split)) for heads in present])
    weights = weights * (rarest / len(split)) ** -rarity_power
    wanted = named_shares("label_shares", label_shares)
    for label, share in wanted.items():
        if not 0 < share < 1 or not 0 < counts.get(label, 0) < len(split):
            raise InputError(f"label_shares cannot give {label!r} {share}: {counts.get(label, 0)} images have it")
    having = {label: np.array([label in heads for heads in present]) for label in wanted}
    for _ in range(RAKES if wanted else 0):
        for label, share in wanted.items():
            now = weights[having[label]].sum() / weights.sum()
            weights = weights * np.where(having[label], share / now, (1 - share) / (1 - now))
    return weights


def named_shares(option: str, texts: tuple[str, ...]) -> dict[str, float]:
    """NAME=SHARE as numbers by name. Raises InputError, naming the option, for texts that do not read so."""
    try:
        return {name: float(share) for name, share in (text.rsplit("=", 1) for text in texts)}
    except ValueError as error:
        raise InputError(f"{option} must read NAME=SHARE, found {list(texts)}") from error
