"""Family "b" of artefacts on skin: functions of the pixel's position, splatted splines, the other templates.

No drawing code is shared with family "a"; only the choice of a place and the laying of templates are.
"""

from train.datasets.counterfactuals.family_b.bubbles import paint_gel_bubble
from train.datasets.counterfactuals.family_b.hair import paint_hair
from train.datasets.counterfactuals.family_b.ink import paint_ink
from train.datasets.counterfactuals.family_b.rulers import paint_ruler
from train.datasets.counterfactuals.templates import Painter

PAINTERS: dict[str, Painter] = {
    "ruler": paint_ruler,
    "gel_bubble": paint_gel_bubble,
    "hair": paint_hair,
    "ink": paint_ink,
}
