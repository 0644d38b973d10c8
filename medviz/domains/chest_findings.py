"""What a chest X-ray may show: the words of each finding, the head that is read for it, and where a prompt puts it."""

from dataclasses import dataclass

from .base import ParsedPrompt
from .lung_places import SIDES

NO_FINDING = "no finding"

# choice: (head, synonyms)
FINDINGS: dict[str, tuple[str, str]] = {
    NO_FINDING: (
        "normal",
        "normal;normal lungs;normal chest;clear lung;lungs are clear;healthy;unremarkable;no acute finding;"
        "no abnormal finding;no abnormality;no pathology;no acute disease;no acute cardiopulmonary disease;"
        "no acute cardiopulmonary abnormality;without finding;without abnormality;no disease;no significant finding",
    ),
    "pneumonia": ("pneumonia", "pneumonic;pneumonitis;lung infection;chest infection"),
    "bacterial pneumonia": ("bacterial_pneumonia", "bacterial;bacteria;bacterial lung infection"),
    "viral pneumonia": ("viral_pneumonia", "viral;virus;viral lung infection"),
    "COVID-19": ("covid_19", "covid;covid 19 pneumonia;covid pneumonia;sars cov 2;coronavirus;corona virus"),
    "edema": ("edema", "oedema;pulmonary edema;pulmonary oedema;lung edema"),
    "cardiomegaly": ("cardiomegaly", "enlarged heart;large heart;enlarged cardiac silhouette"),
    "atelectasis": ("atelectasis", "atelectatic;atelectases;collapse;lung collapse"),
    "pleural effusion": ("effusion", "effusion;pleural fluid"),
    "lung opacity": (
        "opacity",
        "opacity;infiltration;infiltrate;consolidation;opacification;airspace opacity;airspace disease;"
        "ground glass opacity;ground glass;shadowing;patchy opacity",
    ),
}
# Findings of the whole image; the others may be given a place in a lung and come last in a prompt, beside it.
UNPLACED = (NO_FINDING, "edema", "cardiomegaly")
CAUSES = ("bacterial pneumonia", "viral pneumonia")


@dataclass(frozen=True)
class PlacedHead:
    """head: that of the finding which a prompt places. regions: where, all on one side of the chest, all of one size:
    one lung, or zones of it."""

    head: str
    regions: tuple[str, ...]

    @property
    def side(self) -> str:
        """The patient's side: right or left."""
        return self.regions[0].split("_")[0]


def placed_head(parsed: ParsedPrompt) -> PlacedHead | None:
    """The finding of a prompt that is given a place on one side; None where it places none, or one on both sides.

    A place belongs to the last finding, as the prompt builder words it.
    """
    findings = [choice for choice in parsed.values.get("findings", ()) if choice not in UNPLACED]
    places = parsed.values.get("location", ())
    if not findings or len({place.split()[0] for place in places} & set(SIDES)) != 1:
        return None
    lungs = [place for place in places if place.endswith("lung")]
    return PlacedHead(FINDINGS[findings[-1]][0], tuple(place.replace(" ", "_") for place in lungs or places))
