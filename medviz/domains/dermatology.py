"""Dermoscopic images of skin lesions: diagnosis, artefacts and dermoscopic structures.

The prompts follow RL4Med-DDPO (arXiv 2503.15784): "a dermoscopic image with DIAGNOSIS with no visible artifacts" or
"... showing ARTEFACT, ARTEFACT"; its 32 prompts are the validation prompts.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import product

from ..errors import InputError
from .base import (
    NOT_STATED,
    Domain,
    Example,
    Field,
    Head,
    Record,
    Region,
    Values,
    nearest_age,
    number,
    person,
    pick,
    shortened,
)
from .grammar import Lexicon, Term, listed
from .image_places import place_phrase, place_wordings

NO_ARTEFACTS = "no visible artifacts"
NO_ARTEFACT_PHRASES = listed(
    "no artifact;no artefact;no visible artifact;no visible artefact;no imaging artifact;without artifact;"
    "without artefact;without visible artifact;without visible artefact;without any artifact;artifact free;"
    "artefact free;free of artifact;free of artefact"
)

# choice: (code in the records, abbreviation, synonyms)
DIAGNOSES: dict[str, tuple[str, str, str]] = {
    "melanoma": ("mel", "MEL", "malignant melanoma;melanoma in situ"),
    "melanocytic nevus": (
        "nv",
        "NV",
        "nevus;nevi;naevus;naevi;melanocytic nevi;melanocytic naevus;melanocytic naevi;mole;"
        "benign nevus;benign nevi;benign naevus;benign naevi;benign mole",
    ),
    "benign keratosis": (
        "bkl",
        "BKL",
        "benign keratosis like lesion;benign keratoses;seborrheic keratosis;seborrhoeic keratosis;"
        "seborrheic keratoses;solar lentigo;lichen planus like keratosis;seb k",
    ),
    "basal cell carcinoma": ("bcc", "BCC", "basalioma;basal cell cancer"),
    "actinic keratosis": (
        "akiec",
        "AKIEC",
        "ak;actinic keratoses;solar keratosis;intraepithelial carcinoma;bowen;bowen disease;bowen s disease",
    ),
    "vascular lesion": (
        "vasc",
        "VASC",
        "angioma;cherry angioma;hemangioma;haemangioma;angiokeratoma;pyogenic granuloma",
    ),
    "dermatofibroma": ("df", "DF", "fibrous histiocytoma"),
}

# choice: (head and column, synonyms)
ARTEFACTS: dict[str, tuple[str, str]] = {
    "hair": ("hair", "hairy;terminal hair;body hair;dark hair"),
    "gel bubble": ("gel_bubble", "bubble;air bubble;immersion bubble;gel air bubble"),
    "ruler": ("ruler", "ruler mark;ruler marking;scale bar;measurement scale;measuring scale;measurement mark;scale"),
    "ink": (
        "ink",
        "ink mark;ink marking;pen;pen mark;pen marking;surgical ink;surgical marking;marker ink;skin marker",
    ),
    "dark corner": ("dark_corner", "black corner;vignette;vignetting;dark vignette;dark frame corner"),
    "gel border": ("gel_border", "gel edge;border of gel;edge of the gel"),
    "patches": ("patches", "color patch;colour patch;colored patch;coloured patch;color chart;colour chart;sticker"),
}

# choice: (head, synonyms)
STRUCTURES: dict[str, tuple[str, str]] = {
    "pigment network": ("pigment_network", "pigmented network;typical network;reticular pattern"),
    "globules": ("globules", "dots and globules;globular pattern;pigment globule"),
    "streaks": ("streaks", "pseudopod;radial streaming;streak"),
    "milia-like cysts": ("milia_like_cyst", "milia;milium like cyst"),
    "negative network": ("negative_network", "negative pigment network;inverse network;white network"),
}

# choice: (sites in the records, wording after "on", synonyms)
SITES: dict[str, tuple[str, str, str]] = {
    "back": ("back;posterior torso", "the back", "upper back;lower back"),
    "chest": ("chest", "the chest", "breast;decolletage"),
    "abdomen": ("abdomen", "the abdomen", "belly;stomach"),
    "anterior torso": ("anterior torso", "the anterior torso", "front of the torso"),
    "trunk": ("trunk;lateral torso", "the trunk", "torso;flank"),
    "upper extremity": ("upper extremity", "the upper extremity", "arm;forearm;upper arm;shoulder;wrist;elbow"),
    "lower extremity": ("lower extremity", "the lower extremity", "leg;thigh;calf;shin;knee;ankle"),
    "hand": ("hand", "the hand", "finger"),
    "foot": ("foot", "the foot", "feet;toe"),
    "palm or sole": ("palms/soles;acral", "a palm or sole", "palm;sole;acral skin;acral"),
    "face": ("face", "the face", "cheek;nose;forehead;chin;temple"),
    "head and neck": ("head/neck", "the head and neck", "head"),
    "neck": ("neck", "the neck", "throat"),
    "scalp": ("scalp", "the scalp", ""),
    "ear": ("ear", "the ear", "earlobe"),
    "genital area": ("genital", "the genital area", "genital;genitals;groin"),
}

SEXES = {"female": "woman;women;girl;lady", "male": "man;men;boy;gentleman"}
AGES = tuple(range(5, 90, 5))
# What a network guessed counts only when it is sure.
SURE_ABSENT, SURE_PRESENT = 0.2, 0.8

_DIAGNOSIS_OF_CODE = {code: choice for choice, (code, _, _) in DIAGNOSES.items()}
_SITE_OF_RECORD = {site: choice for choice, (sites, _, _) in SITES.items() for site in listed(sites)}
_ARTEFACT_OF_HEAD = {head: choice for choice, (head, _) in ARTEFACTS.items()}
_STRUCTURE_OF_HEAD = {head: choice for choice, (head, _) in STRUCTURES.items()}
_HEAD_OF_DIAGNOSIS = {
    "melanoma": "melanoma",
    "melanocytic nevus": "nevus",
    "benign keratosis": "benign_keratosis",
    "basal cell carcinoma": "basal_cell_carcinoma",
    "actinic keratosis": "actinic_keratosis",
    "vascular lesion": "vascular_lesion",
    "dermatofibroma": "dermatofibroma",
}


def _lexicon() -> Lexicon:
    terms: dict[str, Term] = {}

    def add(phrases: Sequence[str], term: Term) -> None:
        terms.update({phrase: term for phrase in phrases if phrase})

    for choice, (code, short, synonyms) in DIAGNOSES.items():
        term = Term("diagnosis", (choice,), groundable=True, regions=("lesion",))
        add([choice, f"{choice} {short}", code, *listed(synonyms)], term)
    for choice, (_, synonyms) in ARTEFACTS.items():
        add([choice, *listed(synonyms)], Term("artefacts", (choice,), groundable=True))
    for choice, (_, synonyms) in STRUCTURES.items():
        term = Term("structures", (choice,), groundable=True, regions=("lesion",))
        add([choice, *listed(synonyms)], term)
    for choice, (_, _, synonyms) in SITES.items():
        add([choice, *listed(synonyms)], Term("site", (choice,), negatable=False))
    for choice, synonyms in SEXES.items():
        add([choice, *listed(synonyms)], Term("sex", (choice,), negatable=False))
    add(NO_ARTEFACT_PHRASES, Term("artefacts", (NO_ARTEFACTS,), negatable=False))
    add(["lesion", "skin lesion", "pigmented lesion"], Term(groundable=True, regions=("lesion",)))
    add(["border", "lesion border", "edge"], Term(groundable=True, regions=("border",)))
    add(["skin", "surrounding skin", "healthy skin"], Term(groundable=True, regions=("skin",)))
    neutral = (
        "dermoscopic image;dermatoscopic image;dermoscopic;dermatoscopic;dermoscopy;dermatoscopy;close up;"
        "dermoscopic photograph;dermoscopic view;clinical;patient;artifact;artefact;visible;marking;adult;child;person"
    )
    add(listed(neutral), Term())
    add(list(place_wordings()), Term())
    return Lexicon(terms, ages=AGES)


class Dermatology(Domain):
    """See the module."""

    lexicon = _lexicon()

    def build_prompt(self, values: Values) -> str:
        """See `Domain.build_prompt`. Raises InputError also on "no visible artifacts" beside an artefact."""
        chosen = self.checked(values)
        artefacts = chosen.get("artefacts", ())
        if NO_ARTEFACTS in artefacts and len(artefacts) > 1:
            raise InputError(f"{NO_ARTEFACTS!r} excludes {', '.join(a for a in artefacts if a != NO_ARTEFACTS)}")
        prompt = "a dermoscopic image"
        for choice in chosen.get("diagnosis", ()):
            prompt += f" with {choice} ({DIAGNOSES[choice][1]})"
        if NO_ARTEFACTS in artefacts:
            prompt += f" with {NO_ARTEFACTS}"
        elif artefacts:
            prompt += f" showing {', '.join(artefacts)}"
        if structures := chosen.get("structures"):
            prompt += f", with {', '.join(structures)}"
        for choice in chosen.get("site", ()):
            prompt += f", on {SITES[choice][1]}"
        who = person(*(next(iter(chosen.get(field, ())), None) for field in ("age", "sex")))
        return f"{prompt}, {who}" if who else prompt

    def targets(self, said: Mapping[str, tuple[str, ...]], denied: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        """A named artefact, or "no visible artifacts", decides all seven; a diagnosis decides all seven diagnoses."""
        decided: dict[str, float] = {}
        diagnoses = said.get("diagnosis", ())
        if diagnoses:
            decided.update({head: 0.0 for choice, head in _HEAD_OF_DIAGNOSIS.items() if choice not in diagnoses})
        if len(diagnoses) == 1:
            decided[_HEAD_OF_DIAGNOSIS[diagnoses[0]]] = 1.0
        if artefacts := said.get("artefacts"):
            decided.update({head: float(choice in artefacts) for choice, (head, _) in ARTEFACTS.items()})
        decided.update({STRUCTURES[choice][0]: 1.0 for choice in said.get("structures", ())})
        decided.update({_HEAD_OF_DIAGNOSIS[choice]: 0.0 for choice in denied.get("diagnosis", ())})
        decided.update({ARTEFACTS[choice][0]: 0.0 for choice in denied.get("artefacts", ())})
        decided.update({STRUCTURES[choice][0]: 0.0 for choice in denied.get("structures", ())})
        return {head.name: decided[head.name] for head in self.heads if head.name in decided}

    def head_values(self, head: str) -> dict[str, str | tuple[str, ...]]:
        """See `Domain.head_values`."""
        if head in _ARTEFACT_OF_HEAD:
            return {"artefacts": (_ARTEFACT_OF_HEAD[head],)}
        if head in _STRUCTURE_OF_HEAD:
            return {"structures": (_STRUCTURE_OF_HEAD[head],)}
        return {"diagnosis": next(choice for choice, name in _HEAD_OF_DIAGNOSIS.items() if name == head)}

    def validation_prompts(self) -> tuple[str, ...]:
        """The paper's 32: melanoma and nevus, each with every subset of hair, gel bubble, ruler, ink."""
        four = ("hair", "gel bubble", "ruler", "ink")
        prompts = []
        for diagnosis, kept in product(("melanoma", "melanocytic nevus"), product((False, True), repeat=4)):
            artefacts = tuple(artefact for artefact, keep in zip(four, kept, strict=True) if keep)
            prompts.append(self.build_prompt({"diagnosis": diagnosis, "artefacts": artefacts or (NO_ARTEFACTS,)}))
        return tuple(prompts)

    def sheet_prompts(self) -> tuple[str, ...]:
        """Every diagnosis once and melanoma twice, every artefact of the paper among them."""
        shown = {
            "melanoma": NO_ARTEFACTS,
            "melanocytic nevus": "hair",
            "benign keratosis": "ruler",
            "basal cell carcinoma": NO_ARTEFACTS,
            "actinic keratosis": NO_ARTEFACTS,
            "vascular lesion": "gel bubble",
            "dermatofibroma": NO_ARTEFACTS,
        }
        chosen = [*shown.items(), ("melanoma", "ink")]
        return tuple(self.build_prompt({"diagnosis": d, "artefacts": (artefact,)}) for d, artefact in chosen)

    def labels(self, record: Record) -> dict[str, float]:
        """See `Domain.labels`. What a network guessed of artefacts is left out; structures are known of ISIC 2018."""
        labels: dict[str, float] = {}
        diagnosis = _DIAGNOSIS_OF_CODE.get(record.get("diagnosis"))  # type: ignore[call-overload]
        if diagnosis is not None:
            labels.update({head: float(choice == diagnosis) for choice, head in _HEAD_OF_DIAGNOSIS.items()})
        if record.get("artefact_source") != "inferred_probability":
            for head in _ARTEFACT_OF_HEAD:
                label = number(record.get(f"artefact_{head}"))
                if label is not None:
                    labels[head] = min(max(label, 0.0), 1.0)
        if record.get("source") == "ISIC2018-Task1-2":
            for head in _STRUCTURE_OF_HEAD:
                if f"attribute_{head}_mask" in record:
                    labels[head] = float(_has_mask(record, head))
        return labels

    def caption(self, record: Record, rng: random.Random) -> str:
        """See `Domain.caption`. At most 40 tokens; artefacts are named all or not at all, so silence means absence.

        `artefact_place` of a record (head -> place on the image, "" where unknown) comes of an artefact that was added:
        such a record always names its artefacts, and half of the known places.
        """
        present, absent = _artefacts(record)
        rng.shuffle(present)
        diagnosis = _DIAGNOSIS_OF_CODE.get(record.get("diagnosis"))  # type: ignore[call-overload]
        named = rng.random() < (0.95 if diagnosis else 0.0)
        clear = len(absent) == len(ARTEFACTS) and rng.random() < 0.75
        places = record.get("artefact_place")
        shown = present if rng.random() < 0.94 or places else []
        canonical = rng.random() < 0.5
        head = _opening(diagnosis if named else None, canonical, rng)
        if isinstance(places, Mapping):
            shown = [_placed(artefact, str(places.get(ARTEFACTS[artefact][0]) or ""), rng) for artefact in shown]
        if shown:
            head += _showing(shown, canonical, rng)
        elif clear:
            head += f" with {NO_ARTEFACTS}" if canonical else pick(rng, _CLEAR_WORDINGS)
        parts = []
        structures = [choice for name, choice in _STRUCTURE_OF_HEAD.items() if _has_mask(record, name)]
        if structures and rng.random() < 0.7:
            rng.shuffle(structures)
            parts.append(f"with {', '.join(structures)}")
        site = _SITE_OF_RECORD.get(record.get("site"))  # type: ignore[call-overload]
        if site is not None and rng.random() < 0.3:
            parts.append(f"on {SITES[site][1]}")
        if rng.random() < 0.3:
            age = nearest_age(record.get("age"), AGES)
            sex = record.get("sex")
            parts.append(person(None if age is None else str(age), str(sex) if sex in SEXES else None))
        return shortened([part for part in parts if part], lambda kept: ", ".join([head, *kept]))

    def invented_record(self, rng: random.Random) -> dict[str, object]:
        """See `Domain.invented_record`."""
        record: dict[str, object] = {"source": "ISIC2018-Task1-2", "artefact_source": "manual"}
        record["diagnosis"] = rng.choice(list(_DIAGNOSIS_OF_CODE))
        record["site"] = rng.choice(list(_SITE_OF_RECORD))
        record["age"] = float(rng.choice(AGES))
        record["sex"] = rng.choice(list(SEXES))
        clear = rng.random() < 0.15
        record.update({f"artefact_{head}": float(not clear and rng.random() < 0.3) for head in _ARTEFACT_OF_HEAD})
        record.update({f"attribute_{head}_mask": rng.random() < 0.2 for head in _STRUCTURE_OF_HEAD})
        return record


_CLEAR_WORDINGS = {f" with {NO_ARTEFACTS}": 4, ", no artifacts": 1, " without artifacts": 1, ", artifact-free": 0.5}
_OPENINGS = {
    "a dermoscopic image with {}": 4,
    "a dermoscopic image of {}": 3,
    "dermoscopic image of {}": 1,
    "dermoscopy of {}": 1,
    "a dermatoscopic image of {}": 1,
    "{}": 1,
}
_ANONYMOUS = {"a skin lesion": 3, "a lesion": 1, "a pigmented lesion": 0.5}


def _opening(diagnosis: str | None, canonical: bool, rng: random.Random) -> str:
    if diagnosis is None:
        return "a dermoscopic image" if canonical else pick(rng, _OPENINGS).format(pick(rng, _ANONYMOUS))
    short = DIAGNOSES[diagnosis][1]
    full = f"{diagnosis} ({short})"
    if canonical:
        return f"a dermoscopic image with {full}"
    wordings = {full: 2.0, diagnosis: 4.0, short: 1.0}
    if diagnosis == "melanocytic nevus":
        wordings.update({"nevus": 2.0, "a mole": 0.7})
    return pick(rng, _OPENINGS).format(pick(rng, wordings))


def _placed(artefact: str, place: str, rng: random.Random) -> str:
    return f"{artefact} {place_phrase(place)}" if place and rng.random() < 0.5 else artefact


def _showing(artefacts: Sequence[str], canonical: bool, rng: random.Random) -> str:
    if canonical:
        return f" showing {', '.join(artefacts)}"
    listed = ", ".join(artefacts)
    if len(artefacts) > 1 and rng.random() < 0.5:
        listed = f"{', '.join(artefacts[:-1])} and {artefacts[-1]}"
    return pick(rng, {" showing {}": 3, " with {}": 2, ", {}": 1, ", {} visible": 0.5}).format(listed)


def _artefacts(record: Record) -> tuple[list[str], list[str]]:
    """Choices known to be present and known to be absent."""
    guessed = record.get("artefact_source") == "inferred_probability"
    present, absent = [], []
    for choice, (head, _) in ARTEFACTS.items():
        label = number(record.get(f"artefact_{head}"))
        if label is None:
            continue
        if label > SURE_PRESENT or (not guessed and label >= 0.5):
            present.append(choice)
        elif label < SURE_ABSENT or not guessed:
            absent.append(choice)
    return present, absent


def _has_mask(record: Record, head: str) -> bool:
    mask = record.get(f"attribute_{head}_mask")
    return len(mask) > 0 if hasattr(mask, "__len__") else bool(mask)  # type: ignore[arg-type]


DOMAIN = Dermatology(
    name="dermatology",
    label="Dermatology (dermoscopy)",
    fields=(
        Field("diagnosis", "Diagnosis", (NOT_STATED, *DIAGNOSES), info="What the lesion is."),
        Field(
            "artefacts",
            "Artefacts",
            (*ARTEFACTS, NO_ARTEFACTS),
            multiple=True,
            default=(),
            info="What lies on or around the lesion. Naming one asks for the others to be absent.",
            nothing=NO_ARTEFACTS,
        ),
        Field(
            "structures",
            "Dermoscopic structures",
            tuple(STRUCTURES),
            multiple=True,
            default=(),
            info="Patterns within the lesion.",
        ),
        Field("site", "Body site", (NOT_STATED, *SITES), info="Where on the body."),
        Field("age", "Age", (NOT_STATED, *map(str, AGES)), info="Years."),
        Field("sex", "Sex", (NOT_STATED, *SEXES)),
    ),
    heads=(
        *(Head(head, choice.capitalize(), "diagnosis") for choice, head in _HEAD_OF_DIAGNOSIS.items()),
        *(Head(head, choice.capitalize()) for choice, (head, _) in (ARTEFACTS | STRUCTURES).items()),
    ),
    regions=(
        Region("lesion", "Lesion", snomed="95324001", abnormal=True),
        Region("border", "Lesion border", abnormal=True),
        Region("skin", "Surrounding skin", snomed="39937001"),
    ),
    examples=(
        Example("a dermoscopic image with melanoma (MEL) showing hair, ruler", 1),
        Example("a dermoscopic image with melanocytic nevus (NV) with no visible artifacts, with pigment network", 2),
        Example("a dermoscopic image with basal cell carcinoma (BCC), on the face, 70 year old man", 3),
        Example("a dermoscopic image with vascular lesion (VASC) showing gel bubble", 4),
        Example("a dermoscopic image with benign keratosis (BKL), with milia-like cysts", 5),
        Example("a dermoscopic image with melanocytic nevus (NV) showing ink, patches", 6),
    ),
)
