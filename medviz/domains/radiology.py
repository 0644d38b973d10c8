"""Frontal chest X-rays of children and adults: findings, where they lie, and how the image was taken."""

import random
from collections.abc import Mapping, Sequence
from itertools import product

from ..errors import InputError
from .base import (
    CHILD_BELOW_YEARS,
    NOT_STATED,
    Domain,
    Example,
    Field,
    Head,
    Record,
    Values,
    items,
    nearest_age,
    number,
    person,
    pick,
    shortened,
)
from .chest_findings import CAUSES, FINDINGS, NO_FINDING, UNPLACED
from .chest_wordings import UNMENUED, WORDINGS, finding_places, placed_part
from .grammar import Lexicon, Term, listed
from .lung_places import LOCATIONS, LUNGS, MEDIASTINUM, REGIONS, box_locations, location_phrase, location_terms, merged

VIEWS = {"PA": "posteroanterior;postero anterior;posterior anterior", "AP": "anteroposterior;antero posterior"}
AGE_GROUPS = {
    "child": "infant;baby;toddler;paediatric;pediatric;young child;kid;children",
    "adult": "grown up;elderly;elderly adult",
}
SEXES = {"female": "woman;women;lady", "male": "man;men;gentleman"}
YOUNG = {"female": "girl", "male": "boy"}
AGES = tuple(range(5, 95, 5))

# Published label -> what it stands for in the findings field. The rest (mass, hernia, ...) are too rare to learn.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "no finding": (NO_FINDING,),
    "pneumonia": ("pneumonia",),
    "bacterial pneumonia": ("bacterial pneumonia",),
    "viral pneumonia": ("viral pneumonia",),
    "covid-19": ("COVID-19",),
    "covid-19, ards": ("COVID-19",),
    "edema": ("edema",),
    "cardiomegaly": ("cardiomegaly",),
    "atelectasis": ("atelectasis",),
    "effusion": ("pleural effusion",),
    **dict.fromkeys(("infiltration", "infiltrate", "consolidation", "lung opacity"), ("lung opacity",)),
    **dict.fromkeys(("klebsiella", "streptococcus", "legionella", "chlamydophila"), ("bacterial pneumonia",)),
    "mycoplasma bacterial pneumonia": ("bacterial pneumonia",),
    **dict.fromkeys(("varicella", "influenza"), ("viral pneumonia",)),
    **dict.fromkeys(("lipoid", "pneumocystis"), ("pneumonia",)),
}
# Every image of this source was read for each of these; elsewhere a label that is not there is unknown.
FULLY_READ = frozenset({"NIH ChestX-ray14"})
READ_FOR = ("pneumonia", "edema", "cardiomegaly", "atelectasis", "pleural effusion")
CHILDREN_ONLY = frozenset({"Kermany 2018 paediatric"})
_PATIENT_HEADS = {"child": ("age_group", "child"), "pa_view": ("view", "PA"), "male": ("sex", "male")}
BEFORE_COVID = frozenset({"NIH ChestX-ray14", "Kermany 2018 paediatric", "Montgomery (NLM)", "Shenzhen (NLM)", "JSRT"})


def _group(years: float) -> str:
    return "child" if years < CHILD_BELOW_YEARS else "adult"


def _lexicon() -> Lexicon:
    terms = location_terms()

    def add(phrases: Sequence[str], term: Term) -> None:
        terms.update({phrase: term for phrase in phrases if phrase})

    for choice, (_, synonyms) in FINDINGS.items():
        clear = choice == NO_FINDING
        regions = () if clear else (MEDIASTINUM,) if choice == "cardiomegaly" else LUNGS
        term = Term("findings", (choice,), groundable=not clear, regions=regions)
        add([choice, *listed(synonyms)], term)
    # "no finding" holds its own denial; before "normal" a denial counts.
    clear_phrases = [phrase for phrase in terms if phrase.startswith(("no ", "without "))]
    add(clear_phrases, Term("findings", (NO_FINDING,), negatable=False))
    for choice, synonyms in VIEWS.items():
        words = [choice, *listed(synonyms)]
        phrases = [f"{word}{noun}" for word in words for noun in ("", " view", " projection", " film")]
        add(phrases, Term("view", (choice,), negatable=False))
    for choice, synonyms in AGE_GROUPS.items():
        add([choice, *listed(synonyms)], Term("age_group", (choice,), negatable=False))
    for sex, synonyms in SEXES.items():
        add([sex, f"{sex} patient"], Term("sex", (sex,), negatable=False))
        add([YOUNG[sex]], Term("sex", (sex,), negatable=False, also=(("age_group", "child"),)))
        add(listed(synonyms), Term("sex", (sex,), negatable=False, also=(("age_group", "adult"),)))
    for synonyms in UNMENUED.values():
        add(listed(synonyms), Term(groundable=True, regions=LUNGS))
    add(["lung"], Term(groundable=True, regions=LUNGS))
    add(["heart", "mediastinum", "cardiac silhouette"], Term(groundable=True, regions=(MEDIASTINUM,)))
    neutral = (
        "chest x ray;chest xray;chest radiograph;chest radiography;chest film;x ray;xray;radiograph;cxr;frontal;"
        "chest;patient;view;projection;thorax;person;people"
    )
    add(listed(neutral), Term())
    return Lexicon(terms, AGES, lambda years: (("age_group", _group(years)),))


class Radiology(Domain):
    """See the module."""

    lexicon = _lexicon()

    def build_prompt(self, values: Values) -> str:
        """See `Domain.build_prompt`. Raises InputError also on choices that contradict each other."""
        chosen = self.checked(values)
        age_group, age, sex, view = (
            next(iter(chosen.get(field, ())), None) for field in ("age_group", "age", "sex", "view")
        )
        if age is not None and age_group not in (None, _group(int(age))):
            raise InputError(f"a child is under {CHILD_BELOW_YEARS}: age {age} is not a {age_group}'s")
        findings, locations = chosen.get("findings", ()), chosen.get("location", ())
        if NO_FINDING in findings and len(findings) > 1:
            raise InputError(f"{NO_FINDING!r} excludes {', '.join(found for found in findings if found != NO_FINDING)}")
        placed = [finding for finding in findings if finding not in UNPLACED]
        if locations and not placed:
            allowed = ", ".join(choice for choice in FINDINGS if choice not in UNPLACED)
            raise InputError(f"a location needs a finding that lies there; choose one of {allowed}")
        parts = [finding for finding in findings if finding in UNPLACED] + placed
        if locations:
            parts[-1] += f" in {location_phrase(merged(locations))}"
        if view is not None:
            parts.append(f"{view} view")
        who = person(age, sex, age_group)
        return ", ".join([f"a frontal chest X-ray{_of(who)}", *parts])

    def targets(self, said: Mapping[str, tuple[str, ...]], denied: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        """ "No finding" decides every finding; a finding decides itself, "normal", and what it implies or excludes."""
        findings = said.get("findings", ())
        decided: dict[str, float] = {}
        for choice in denied.get("findings", ()):
            decided[FINDINGS[choice][0]] = 0.0
            if choice == "pneumonia":
                decided.update({FINDINGS[cause][0]: 0.0 for cause in CAUSES})
        if findings:
            decided["normal"] = 0.0
            if findings == (NO_FINDING,):
                decided.update({head: float(choice == NO_FINDING) for choice, (head, _) in FINDINGS.items()})
        decided.update({FINDINGS[choice][0]: 1.0 for choice in findings if choice != NO_FINDING})
        decided.update(_implied(findings))
        for field, head, choice in (
            ("age_group", "child", "child"),
            ("view", "pa_view", "PA"),
            ("sex", "male", "male"),
        ):
            if len(said.get(field, ())) == 1:
                decided[head] = float(said[field] == (choice,))
        return {head.name: decided[head.name] for head in self.heads if head.name in decided}

    def head_values(self, head: str) -> dict[str, str | tuple[str, ...]]:
        """See `Domain.head_values`."""
        asked: dict[str, dict[str, str | tuple[str, ...]]] = {
            "child": {"age_group": "child"},
            "pa_view": {"view": "PA"},
            "male": {"sex": "male", "age_group": "adult"},
        }
        return asked.get(head) or {
            "findings": next((choice,) for choice, (name, _) in FINDINGS.items() if name == head)
        }

    def sheet_prompts(self) -> tuple[str, ...]:
        """A child and an adult without and with pneumonia, both sides, fluid, a large heart."""
        adult: Values = {"age_group": "adult", "view": "PA"}
        chosen: list[Values] = [
            {"age_group": "child", "findings": (NO_FINDING,)},
            {"age_group": "child", "findings": ("bacterial pneumonia",)},
            {**adult, "findings": (NO_FINDING,), "sex": "female"},
            {**adult, "findings": ("lung opacity",), "location": ("right lower zone",)},
            {**adult, "findings": ("lung opacity",), "location": ("left upper zone",)},
            {**adult, "findings": ("pleural effusion",), "view": "AP"},
            {**adult, "findings": ("cardiomegaly",)},
            {**adult, "findings": ("COVID-19",), "view": "AP"},
        ]
        return tuple(self.build_prompt(values) for values in chosen)

    def validation_prompts(self) -> tuple[str, ...]:
        """24: children and adults of both sexes and views, each finding, each side and level."""
        child: list[Values] = [
            {"age_group": "child", "findings": (finding,), "view": view}
            for finding, view in product((NO_FINDING, *CAUSES), (NOT_STATED, "AP"))
        ]
        adults = [
            {"findings": (NO_FINDING,), "sex": sex, "age_group": "adult", "view": view}
            for sex, view in product(SEXES, VIEWS)
        ]
        places = ("right lower zone", "left lower zone", "right mid zone", "left mid zone", "right upper zone")
        adults += [{"findings": ("lung opacity",), "location": (place,), "age_group": "adult"} for place in places]
        adults += [
            {"findings": (finding,), "sex": sex, "age": age, "view": view}
            for finding, sex, age, view in (
                ("pneumonia", "female", "50", "AP"),
                ("pneumonia", "male", "35", "PA"),
                ("COVID-19", "female", "60", "AP"),
                ("COVID-19", "male", "55", "PA"),
                ("pleural effusion", "female", "45", "PA"),
                ("pleural effusion", "male", "65", "AP"),
                ("edema", "male", "40", "AP"),
                ("atelectasis", "female", "55", "AP"),
                ("cardiomegaly", "female", "50", "PA"),
            )
        ]
        return tuple(self.build_prompt(values) for values in child + adults)

    def labels(self, record: Record) -> dict[str, float]:
        """See `Domain.labels`. A label that a source did not look for is unknown, not absent."""
        found, source = _published(record), record.get("source")
        labels: dict[str, float] = {}
        if NO_FINDING in found:
            labels.update({head: float(choice == NO_FINDING) for choice, (head, _) in FINDINGS.items()})
        elif items(record.get("findings")):
            labels["normal"] = 0.0
            if source in FULLY_READ:
                labels.update({FINDINGS[choice][0]: 0.0 for choice in READ_FOR})
                if "pneumonia" not in found:
                    labels["opacity"] = 0.0
                if NO_FINDING in items(record.get("findings")):
                    del labels["pneumonia"]
            labels.update({FINDINGS[choice][0]: 1.0 for choice in found})
            labels.update(_implied(found))
            if source in BEFORE_COVID:
                labels.setdefault("covid_19", 0.0)
        if source in CHILDREN_ONLY:
            labels["child"] = 1.0
        elif (years := number(record.get("age"))) is not None:
            labels["child"] = float(years < CHILD_BELOW_YEARS)
        if record.get("view") in VIEWS:
            labels["pa_view"] = float(record["view"] == "PA")
        if record.get("sex") in SEXES:
            labels["male"] = float(record["sex"] == "male")
        return {head.name: labels[head.name] for head in self.heads if head.name in labels}

    def caption(self, record: Record, rng: random.Random) -> str:
        """See `Domain.caption`. At most 40 tokens; findings are named all or not at all, each with its place.

        A record may hold `finding_places`, a mapping (or its JSON) from words of findings to the places of each, as in
        {"nodule": ["left upper zone"]}: what the picture shows, said instead of its findings and boxes.
        """
        canonical = rng.random() < 0.5
        opening = "a frontal chest X-ray" if canonical else pick(rng, _OPENINGS)
        head = f"{opening}{_of(_patient(record, rng))}"
        view = record.get("view")
        view_part = pick(rng, {f"{view} view": 4.0, f"{view} projection": 0.5}) if view in VIEWS else ""
        if rng.random() > 0.55:
            view_part = ""
        findings = _finding_part(record, canonical, rng) if rng.random() < 0.95 else ""
        parts = [part for part in (findings, view_part) if part]
        if not canonical and len(parts) == 2 and rng.random() < 0.4:
            parts.reverse()
        return shortened(parts, lambda kept: ", ".join([head, *kept]))

    def invented_record(self, rng: random.Random) -> dict[str, object]:
        """See `Domain.invented_record`."""
        findings = [rng.choice(list(PUBLISHED))] if rng.random() < 0.6 else rng.sample(list(PUBLISHED), 2)
        box = {"x": rng.uniform(0.05, 0.6), "y": rng.uniform(0.1, 0.6), "w": 0.3, "h": rng.uniform(0.2, 0.6)}
        return {
            "source": rng.choice(sorted(CHILDREN_ONLY | FULLY_READ)),
            "findings": [NO_FINDING] if NO_FINDING in findings else findings,
            "boxes": [{"label": "lung opacity", **box}] if NO_FINDING not in findings and rng.random() < 0.6 else [],
            "view": rng.choice(list(VIEWS)),
            "age": rng.choice((None, *map(float, AGES))),
            "sex": rng.choice((None, *SEXES)),
        }


_OPENINGS = {
    "a frontal chest X-ray": 3.0,
    "a chest X-ray": 4.0,
    "chest X-ray": 1.5,
    "a chest radiograph": 1.5,
    "a frontal chest radiograph": 1.0,
}


def _of(who: str) -> str:
    return f" of {'an' if who.startswith(('a', '8', '11 ', '18 ')) else 'a'} {who}" if who else ""


def _implied(findings: Sequence[str]) -> dict[str, float]:
    """A cause implies pneumonia and, alone, excludes the other cause."""
    causes = [choice for choice in findings if choice in CAUSES]
    implied = {"pneumonia": 1.0} if causes else {}
    if len(causes) == 1:
        implied.update({FINDINGS[cause][0]: float(cause in causes) for cause in CAUSES})
    return implied


def _published(record: Record) -> tuple[str, ...]:
    """What the record's labels and boxes stand for, in the order of FINDINGS.

    Readers drew the boxes while the labels of NIH images are mined from text, so a box overrules "no finding".
    """
    names = [*items(record.get("findings")), *(box["label"] for box in items(record.get("boxes")))]
    found = {choice for name in names for choice in PUBLISHED.get(name, ())}
    if len(found) > 1:
        found.discard(NO_FINDING)
    return tuple(choice for choice in FINDINGS if choice in found)


def _patient(record: Record, rng: random.Random) -> str:
    """The patient in words; often only in part, or not at all."""
    years = number(record.get("age"))
    child = record.get("source") in CHILDREN_ONLY
    group = "child" if child else None if years is None else _group(years)
    age = nearest_age(years, AGES)
    if group is not None and age is not None and _group(age) != group:
        age = None
    sex = str(record["sex"]) if record.get("sex") in SEXES else None
    if rng.random() < 0.25:
        return ""
    stated_sex = sex if rng.random() < 0.6 else None
    return person(str(age) if age is not None and rng.random() < 0.4 else None, stated_sex, group)


def _finding_part(record: Record, canonical: bool, rng: random.Random) -> str:
    if seen := finding_places(record):
        return placed_part(seen, canonical, rng)
    found = _published(record)
    if any(cause in found for cause in CAUSES):
        found = tuple(choice for choice in found if choice != "pneumonia")
    placed: dict[str, list[str]] = {}
    for box in items(record.get("boxes")):
        for choice in PUBLISHED.get(box["label"], ()):
            if choice not in UNPLACED:
                placed.setdefault(choice, []).extend(box_locations(box))
    says_places = rng.random() < 0.85
    phrases = []
    # A finding with a place comes last, as in build_prompt, so that the place is read as its own.
    for choice in sorted(found, key=lambda choice: choice in placed):
        phrase = choice if canonical else pick(rng, WORDINGS.get(choice, {choice: 1.0}))
        if says_places and choice in placed:
            phrase += f" in {location_phrase(merged(placed[choice]))}"
        phrases.append(phrase)
    if len(phrases) > 1 and not canonical and rng.random() < 0.5:
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return ", ".join(phrases)


DOMAIN = Radiology(
    name="radiology",
    label="Radiology (chest X-ray)",
    fields=(
        Field("age_group", "Patient", (NOT_STATED, *AGE_GROUPS), info="A child is under 18."),
        Field("age", "Age", (NOT_STATED, *map(str, AGES)), info="Years."),
        Field("sex", "Sex", (NOT_STATED, *SEXES)),
        Field("findings", "Findings", tuple(FINDINGS), multiple=True, default=(), info="What the X-ray shows."),
        Field(
            "location",
            "Location",
            LOCATIONS,
            multiple=True,
            default=(),
            info="Where the last finding lies. Sides are the patient's: right is on the left of the image.",
        ),
        Field("view", "View", (NOT_STATED, *VIEWS), info="PA: standing, beam from behind. AP: often lying down."),
    ),
    heads=(
        *(
            Head(head, choice[0].upper() + choice[1:], "cause" if choice in CAUSES else None, aspect="finding")
            for choice, (head, _) in FINDINGS.items()
        ),
        Head("child", "Child", aspect="person"),
        Head("pa_view", "PA view", aspect="view"),
        Head("male", "Male", aspect="person"),
    ),
    regions=REGIONS,
    examples=(
        Example("a frontal chest X-ray of a child, bacterial pneumonia, AP view", 1),
        Example("a frontal chest X-ray of a child, no finding, AP view", 2),
        Example("a frontal chest X-ray of a 60 year old man, no finding, PA view", 3),
        Example("a frontal chest X-ray of an adult, lung opacity in the right lower zone", 4),
        Example("a frontal chest X-ray of a 55 year old woman, COVID-19, AP view", 5),
        Example("a frontal chest X-ray of a woman, pleural effusion, PA view", 6),
    ),
)
