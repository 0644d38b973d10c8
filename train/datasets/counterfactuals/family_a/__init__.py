"""Family "a" of artefacts on skin: OpenCV's polygons and polylines, two thirds of the templates."""

from train.datasets.counterfactuals.family_a.bubbles import paint_gel_bubble
from train.datasets.counterfactuals.family_a.hair import paint_hair
from train.datasets.counterfactuals.family_a.ink import paint_ink
from train.datasets.counterfactuals.family_a.rulers import paint_ruler
from train.datasets.counterfactuals.templates import Painter

PAINTERS: dict[str, Painter] = {
    "ruler": paint_ruler,
    "gel_bubble": paint_gel_bubble,
    "hair": paint_hair,
    "ink": paint_ink,
}
