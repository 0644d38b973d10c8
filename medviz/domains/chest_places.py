"""Places of a frontal chest X-ray that words can name, finer than the zones of the menus: hilum, base, apex, angle.

Sides are the patient's: the right lung is on the left of the image. What a zone or a lung is called stands in
`lung_places`; here are the places an atlas knows, the wordings that prompts are made of, and a grammar that reads all.
"""

import re
from collections.abc import Iterable
from itertools import product

from .grammar import Lexicon, Term, listed
from .lung_places import LEVELS, SIDES, location_terms

ZONES = tuple(f"{level} zone" for level in LEVELS)
FINE_PARTS = ("base", "apex", "hilum", "costophrenic angle")
PARTS = ("lung", *ZONES, *FINE_PARTS)
HEART, MEDIASTINUM, BILATERAL, DIFFUSE = "cardiac silhouette", "mediastinum", "bilateral", "diffuse"
PLACES = (*(f"{side} {part}" for part, side in product(PARTS, SIDES)), HEART, MEDIASTINUM, BILATERAL, DIFFUSE)

_SYNONYMS = {
    "lung": ("lung",),
    **{f"{level} zone": (f"{level} zone", f"{level} lung zone", f"{level} lobe") for level in LEVELS},
    "base": ("base", "lung base"),
    "apex": ("apex", "lung apex"),
    "hilum": ("hilum", "perihilar region"),
    "costophrenic angle": ("costophrenic angle",),
}
_PLURALS = {**{zone: f"{zone}s" for zone in ZONES}, "base": "bases", "apex": "apices"}


def _wordings() -> dict[str, tuple[str, ...]]:
    wordings: dict[str, tuple[str, ...]] = {
        f"{side} {word}": (f"{side} {part}",) for part, side in product(PARTS, SIDES) for word in _SYNONYMS[part]
    }
    for part, plural in _PLURALS.items():
        wordings[f"both {plural}"] = tuple(f"{side} {part}" for side in SIDES)
    alone = {place: (place,) for place in (HEART, MEDIASTINUM, BILATERAL, DIFFUSE)}
    return {**wordings, **alone, "both lungs": (BILATERAL,)}


WORDINGS: dict[str, tuple[str, ...]] = _wordings()
"""How a prompt may word a place -> the places it names, the first wording of each place being its canonical one."""


def mirrored_place(place: str) -> str:
    """The same place of the other side; a place without a side is its own."""
    swapped = {SIDES[0]: SIDES[1], SIDES[1]: SIDES[0]}
    first, _, rest = place.partition(" ")
    return f"{swapped[first]} {rest}" if first in swapped else place


def wordings_of(places: Iterable[str]) -> tuple[str, ...]:
    """The wordings that name exactly these places, the canonical one first; empty where there is none."""
    wanted = tuple(place for place in PLACES if place in set(places))
    return tuple(wording for wording, named in WORDINGS.items() if named == wanted)


def _terms() -> dict[str, Term]:
    terms = {}
    for phrase, term in location_terms().items():
        whole = set(term.choices) == {f"{side} lung" for side in SIDES}
        terms[phrase] = (BILATERAL,) if whole else term.choices
    for side in (*SIDES, "both", "bilateral", ""):
        sides = (side,) if side in SIDES else SIDES
        for part, words in {
            "base": ("base", "lung base", "basal region"),
            "apex": ("apex", "apice", "lung apex", "lung apice", "apical region"),
            "hilum": listed(
                "hilum;hila;hilus;hilar;hilar region;hilar area;perihilar;perihilar region;perihilar area;"
                "peri hilar;peri hilar region;parahilar;parahilar region"
            ),
            "costophrenic angle": ("costophrenic angle", "costophrenic sulcus", "costophrenic recess", "cp angle"),
        }.items():
            terms.update({f"{side} {word}".strip(): tuple(f"{each} {part}" for each in sides) for word in words})
    both = {"base": ("bibasal", "bibasilar"), "hilum": ("bihilar",), "apex": ("biapical",)}
    terms.update({word: tuple(f"{side} {part}" for side in SIDES) for part, words in both.items() for word in words})
    terms.update(dict.fromkeys(("cardiac silhouette", "heart", "cardiac shadow", "retrocardiac"), (HEART,)))
    terms.update(dict.fromkeys(("mediastinum", "mediastinal"), (MEDIASTINUM,)))
    terms.update(dict.fromkeys(("bilateral", "bilaterally", "both lung"), (BILATERAL,)))
    terms.update(dict.fromkeys(("diffuse", "diffusely", "widespread", "generalised", "generalized"), (DIFFUSE,)))
    return {phrase: Term("location", tuple(places), place=True) for phrase, places in terms.items()}


_LEXICON = Lexicon(_terms())
_SIDED = re.compile(r"\b(" + "|".join(SIDES) + r")\b", re.IGNORECASE)
_BOTH = re.compile(r"\b(both|bi\w+)\b", re.IGNORECASE)


def places_in(text: str, *, careful: bool = False) -> tuple[str, ...]:
    """The places that a text names and does not deny, each once, in order. Never raises on text.

    A pair without a side ("lower zones") is both places. careful: for running text, leave out a side that stands alone
    ("left jugular line"), and a pair without a side in a text that speaks of one side ("right mid and lower zone").
    """
    mentions = [mention for mention in _LEXICON.read(text).mentions if not mention.denied]
    worded = [(mention, text[mention.start : mention.end]) for mention in mentions]
    if careful:
        worded = [(mention, words) for mention, words in worded if not _SIDED.fullmatch(words)]
        if any(_SIDED.search(words) for _, words in worded):
            worded = [(m, words) for m, words in worded if len(m.term.choices) == 1 or _BOTH.search(words)]
    return tuple(dict.fromkeys(place for mention, _ in worded for place in mention.term.choices))
