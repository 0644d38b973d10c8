"""Names of places on an image: its edges, corners and centre, and how a prompt words them."""

from collections.abc import Iterator

from .grammar import listed

EDGES = ("upper edge", "lower edge", "left edge", "right edge")
CORNERS = ("upper left corner", "upper right corner", "lower left corner", "lower right corner")
CENTRE = "centre"
IMAGE_PLACES = (*EDGES, *CORNERS, CENTRE)

_VERTICAL = {"upper": "upper;top", "lower": "lower;bottom"}
_SIDES = ("left", "right")
_NOUNS = ("edge", "margin", "side")


def place_phrase(place: str) -> str:
    """ "at the lower edge", "in the upper left corner", "in the centre"."""
    return f"{'at' if place in EDGES else 'in'} the {place}"


def place_wordings() -> Iterator[str]:
    """The phrases that name a place on the image, as people word them: "bottom margin", "top left corner", "center"."""
    vertical = [word for words in _VERTICAL.values() for word in listed(words)]
    for word in (*vertical, *_SIDES):
        for noun in _NOUNS:
            yield f"{word} {noun}"
            yield f"{word} {noun} of the image"
    for word in vertical:
        for side in _SIDES:
            yield f"{word} {side} corner"
            yield f"{word} {side}"
    yield from (f"{word}{rest}" for word in listed("centre;center;middle") for rest in ("", " of the image"))
