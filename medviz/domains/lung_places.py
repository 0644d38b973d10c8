"""Where in the lungs: names of places, their phrases, and the place of a box.

Sides are the patient's: the right lung is on the left of the image.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from .base import Region
from .grammar import Term, listed

SIDES, LEVELS = ("right", "left"), ("upper", "mid", "lower")
LOCATIONS = ("right lung", "left lung", *(f"{side} {level} zone" for level, side in product(LEVELS, SIDES)))
LUNGS = ("right_lung", "left_lung")
MEDIASTINUM = "mediastinum"
_SNOMED = {"right lung": "3341006", "left lung": "44029006"}
REGIONS = (
    *(Region(place.replace(" ", "_"), place.capitalize(), _SNOMED.get(place, "")) for place in LOCATIONS),
    Region(MEDIASTINUM, "Mediastinum", "72410000"),
)

# Heights of a frontal X-ray, as fractions from the top, where the upper and middle thirds of the median lung end.
UPPER_ENDS, MID_ENDS = 0.36, 0.60
# A box taller than this spans several zones; one wider than this that crosses the midline lies in both lungs.
TALL, WIDE = 0.45, 0.45

_LEVEL_WORDS = {"upper": "upper;apical;superior", "mid": "mid;middle", "lower": "lower;basal;inferior;basilar"}
_NOUNS = ("zone", "lobe", "lung zone", "lung field", "field", "lung")
_WHOLE_LUNG = ("lung", "sided", "side", "hemithorax", "lung field", "pulmonary")


def location_terms() -> dict[str, Term]:
    """Phrases that name a place in the lungs: "right lower zone", "left base", "bilateral", "upper zones"."""
    terms: dict[str, Term] = {}

    def add(phrases: Iterable[str], locations: Sequence[str]) -> None:
        regions = tuple(location.replace(" ", "_") for location in locations)
        term = Term("location", tuple(locations), groundable=True, regions=regions, place=True)
        terms.update(dict.fromkeys(phrases, term))

    for level, synonyms in _LEVEL_WORDS.items():
        for word, noun in product(listed(synonyms), _NOUNS):
            add([f"{word} {noun}"], [f"{side} {level} zone" for side in SIDES])
    for word, sides in {"right": SIDES[:1], "left": SIDES[1:], "both": SIDES, "bilateral": SIDES}.items():
        add([f"{word} {noun}" for noun in _WHOLE_LUNG], [f"{side} lung" for side in sides])
        if word != "both":
            add([word], [f"{side} lung" for side in sides])
        for level, synonyms in _LEVEL_WORDS.items():
            zones = [f"{side} {level} zone" for side in sides]
            for level_word in listed(synonyms):
                add([f"{word} {level_word}"], zones)
                for noun in _NOUNS:
                    add([f"{word} {level_word} {noun}", f"{level_word} {word} {noun}"], zones)
                    add([f"{level_word} {noun} of the {word} lung", f"{word} lung {level_word} {noun}"], zones)
        add([f"{word} base", f"{word} lung base"], [f"{side} lower zone" for side in sides])
        add([f"{word} apex", f"{word} lung apex"], [f"{side} upper zone" for side in sides])
    add(["bibasal", "bibasilar", "lung base", "base"], [f"{side} lower zone" for side in SIDES])
    add(["apex", "apical", "lung apex"], [f"{side} upper zone" for side in SIDES])
    return terms


def location_phrase(locations: Sequence[str]) -> str:
    """The canonical wording: "both lungs", "the right lower zone and the left mid zone"."""
    named = []
    for place in ("lung", *(f"{level} zone" for level in LEVELS)):
        sides = [side for side in SIDES if f"{side} {place}" in locations]
        named.append(f"both {place}s" if len(sides) == 2 else f"the {sides[0]} {place}" if sides else "")
    return " and ".join(name for name in named if name)


def box_locations(box: Mapping[str, float]) -> tuple[str, ...]:
    """Places of a box {x, y, w, h} in fractions of the image, origin top left.

    The zone is that of the box's centre; a tall box is the whole lung and a wide one across the midline both lungs.
    """
    left, right = box["x"], box["x"] + box["w"]
    middle_x, middle_y = (left + right) / 2, box["y"] + box["h"] / 2
    sides = SIDES if box["w"] > WIDE and left < 0.5 < right else SIDES[:1] if middle_x < 0.5 else SIDES[1:]
    if box["h"] > TALL:
        return tuple(f"{side} lung" for side in sides)
    level = LEVELS[(middle_y >= UPPER_ENDS) + (middle_y >= MID_ENDS)]
    return tuple(f"{side} {level} zone" for side in sides)


def merged(locations: Iterable[str]) -> tuple[str, ...]:
    """Each place once, in order; a whole lung takes in its zones, and three zones of a side are the whole lung."""
    found = set(locations)
    for side in SIDES:
        zones = {location for location in found if location.startswith(side) and location.endswith("zone")}
        if len(zones) == len(LEVELS):
            found.add(f"{side} lung")
        if f"{side} lung" in found:
            found -= zones
    return tuple(location for location in LOCATIONS if location in found)
