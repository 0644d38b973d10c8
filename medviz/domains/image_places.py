"""Names of places on an image: its edges, corners and centre, and how a prompt words them."""

from collections.abc import Iterator

from .grammar import listed

EDGES = ("upper edge", "lower edge", "left edge", "right edge")
CORNERS = ("upper left corner", "upper right corner", "lower left corner", "lower right corner")
CENTRE = "centre"
IMAGE_PLACES = (*EDGES, *CORNERS, CENTRE)

_VERTICAL = {"upper": "upper;top", "lower": "lower;bottom"}
_NOUNS = ("edge", "margin", "side")


def place_phrase(place: str) -> str:
    """ "at the lower edge", "in the upper left corner", "in the centre"."""
    return f"{'at' if place in EDGES else 'in'} the {place}"


def place_wordings() -> Iterator[str]:
    """The phrases that name a place on the image, as people word them: "bottom margin", "top left corner", "center"."""
    vertical = [word for words in _VERTICAL.values() for word in listed(words)]
    for word in (*vertical, "left", "right"):
        yield from (f"{word} {noun}" for noun in _NOUNS)
        yield from (f"{noun} of the image" if word == "left" else f"{word} of the image" for noun in ("edge",))
    for word in vertical:
        for side in ("left", "right"):
            yield f"{word} {side} corner"
            yield f"{word} {side}"
    yield from listed("centre;center;middle;centre of the image;center of the image;middle of the image")
