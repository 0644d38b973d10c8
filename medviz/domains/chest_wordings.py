"""How captions of chest X-rays word findings, also those that have a place but no menu entry."""

import json
import random
from collections.abc import Mapping, Sequence

from .base import Record, pick
from .chest_findings import NO_FINDING
from .lung_places import location_phrase, merged

WORDINGS = {
    NO_FINDING: {NO_FINDING: 3.0, "normal lungs": 1.0, "normal": 0.7, "clear lungs": 0.7, "no abnormality": 0.3},
    "lung opacity": {"lung opacity": 2.0, "opacity": 3.0, "infiltrate": 0.6, "consolidation": 0.6},
    "pleural effusion": {"pleural effusion": 2.0, "effusion": 1.0},
    "edema": {"edema": 2.0, "pulmonary edema": 1.0},
    "cardiomegaly": {"cardiomegaly": 3.0, "an enlarged heart": 0.5},
    "COVID-19": {"COVID-19": 4.0, "COVID-19 pneumonia": 1.0, "covid": 0.4},
}
"""Finding -> its wordings and their weights; a finding that is not here has one."""
# Words of what a picture shows that has no menu entry and no head of its own; a consolidation is read as an opacity.
UNMENUED = {
    "nodule": "nodule;pulmonary nodule;lung nodule",
    "cavity": "cavity;cavitation;cavitary lesion",
    "tuberculosis": "tuberculosis;pulmonary tuberculosis",
}


def finding_places(record: Record) -> dict[str, Sequence[str]]:
    """`finding_places` of a record as a mapping; empty where it has none."""
    found: object = record.get("finding_places")
    if isinstance(found, str):
        found = json.loads(found)
    return dict(found) if isinstance(found, Mapping) else {}


def placed_part(found: Mapping[str, Sequence[str]], canonical: bool, rng: random.Random) -> str:
    """What `finding_places` says, those without a place last: "lung opacity in the left upper zone, tuberculosis"."""
    says_places, phrases = rng.random() < 0.85, []
    for choice in sorted(found, key=lambda choice: not found[choice]):
        places = merged(found[choice]) if says_places else ()
        # A consolidation is worded as one, though the menus know it as an opacity.
        phrase = choice if canonical else pick(rng, WORDINGS.get(choice, {choice: 1.0}))
        sides = {place.split()[0] for place in places if place.endswith("lung")}
        if places and choice == "pleural effusion" and len(sides) == 1 and not canonical:
            side = next(iter(sides))
            phrase = pick(rng, {f"{side} {phrase}": 1.0, f"{phrase} on the {side}": 2.0})
        elif places:
            phrase += f" in {location_phrase(places)}"
        phrases.append(phrase)
    return ", ".join(phrases)
