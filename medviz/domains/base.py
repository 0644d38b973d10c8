"""The contract that every domain keeps, and the parts of it that need no medical knowledge."""

import json
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from .grammar import Lexicon, Reading

NOT_STATED = "not stated"
"""The choice of a single-choice field that leaves the field out of the prompt."""

CHILD_BELOW_YEARS = 18
CAPTION_TOKENS = 40
"""Most words and punctuation marks of a training caption."""

_CAPTION_TOKEN = re.compile(r"\w+|[^\w\s]")

Values = Mapping[str, str | Sequence[str]]
Record = Mapping[str, object]


@dataclass(frozen=True)
class Field:
    """One menu of the prompt builder.

    choices: what may be chosen; a single-choice field begins with NOT_STATED.
    default: one of the choices, or a tuple of them where `multiple`.
    info: one line for the person who chooses.
    nothing: the choice that says none of the others is there, empty where the field has none.
    alone: the choice that cannot stand beside others, empty where that is `nothing` or there is none.
    """

    name: str
    label: str
    choices: tuple[str, ...]
    multiple: bool = False
    default: str | tuple[str, ...] = NOT_STATED
    info: str = ""
    nothing: str = ""
    alone: str = ""


@dataclass(frozen=True)
class Head:
    """One yes-or-no question that a classifier answers of an image; heads of one group exclude each other.

    aspect: the part of a report that the question belongs to, empty where reports have no parts.
    """

    name: str
    label: str
    group: str | None = None
    aspect: str = ""


@dataclass(frozen=True)
class Region:
    """A named part of the anatomy that a segmenter can mark.

    snomed: its SNOMED CT concept, empty where there is none; abnormal: whether it is a finding and no normal anatomy.
    """

    name: str
    label: str
    snomed: str = ""
    abnormal: bool = False


@dataclass(frozen=True)
class Imaging:
    """What a DICOM file says of a domain's images.

    body_part: Body Part Examined, one that is no pair; empty where it differs from image to image.
    orientation: the patient's direction along rows and along columns ("L" left, "F" feet, ...); None where no side is
    known. grey: whether colour means nothing.
    """

    body_part: str = ""
    orientation: tuple[str, str] | None = None
    grey: bool = False


@dataclass(frozen=True)
class Example:
    """A prompt worth showing, with the seed it looks well with."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class ParsedPrompt:
    """What a prompt was understood to say.

    values: field -> choices found, in order; only fields that the prompt states. What is denied ("no hair") is in
        `targets` alone.
    targets: head -> 1.0 or 0.0; only heads that the prompt decides.
    unknown_words: words outside the vocabulary, as written.
    words: phrases worth grounding, as written and in order, each meaning once.
    """

    prompt: str
    values: dict[str, tuple[str, ...]]
    targets: dict[str, float]
    unknown_words: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Domain(ABC):
    """A medical domain: how to ask for an image, how to read the request, how to name what an image shows."""

    name: str
    label: str
    fields: tuple[Field, ...]
    heads: tuple[Head, ...]
    regions: tuple[Region, ...]
    examples: tuple[Example, ...]
    imaging: Imaging = Imaging()

    lexicon: ClassVar[Lexicon]

    @abstractmethod
    def build_prompt(self, values: Values) -> str:
        """The canonical prompt of menu choices. Raises InputError on a field or choice that does not exist."""

    @abstractmethod
    def caption(self, record: Record, rng: random.Random) -> str:
        """A training caption of one image record; what the record does not know is not mentioned."""

    @abstractmethod
    def labels(self, record: Record) -> dict[str, float]:
        """head -> label in [0, 1] of one image record; heads that the record does not know are absent."""

    @abstractmethod
    def targets(self, said: Mapping[str, tuple[str, ...]], denied: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        """head -> 0.0 or 1.0 of what a prompt says and denies (field -> choices)."""

    @abstractmethod
    def head_values(self, head: str) -> dict[str, str | tuple[str, ...]]:
        """The menu choices that ask for nothing but `head`."""

    @abstractmethod
    def validation_prompts(self) -> tuple[str, ...]:
        """The fixed prompts that models are compared on."""

    @abstractmethod
    def sheet_prompts(self) -> tuple[str, ...]:
        """Eight prompts that differ as much as the domain allows, for pictures that a person looks over."""

    @abstractmethod
    def invented_record(self, rng: random.Random) -> dict[str, object]:
        """A record drawn at random that no patient stands behind, to word captions from."""

    def parse(self, prompt: str) -> ParsedPrompt:
        """Read any text. Never raises on text: what is not understood is in `unknown_words`."""
        reading = self.lexicon.read(prompt)
        said = _choices(reading, denied=False)
        denied = {
            field: left
            for field, choices in _choices(reading, denied=True).items()
            if (left := tuple(choice for choice in choices if choice not in said.get(field, ())))
        }
        words: dict[object, str] = {}
        for mention in reading.mentions:
            if mention.term.groundable and not mention.denied:
                words.setdefault(mention.term, prompt[mention.start : mention.end])
        targets = self.targets(said, denied)
        return ParsedPrompt(prompt, said, targets, reading.unknown_words, tuple(dict.fromkeys(words.values())))

    def contrast(self, prompt: str, heads: Sequence[str]) -> tuple[str, str] | None:
        """Two prompts in the domain's own words: what `prompt` says, and the same but for what it asks for of `heads`.

        A field that takes one choice and has several in the prompt is in neither. None where the prompt asks for none
        of `heads`, or contradicts itself. Raises InputError on an unknown head.
        """
        known = [self.head(name).name for name in heads]
        parsed = self.parse(prompt)
        fields = {field.name: field for field in self.fields}
        said = {name: found for name, found in parsed.values.items() if fields[name].multiple or len(found) == 1}
        less = dict(said)
        for head in known:
            if parsed.targets.get(head) != 1.0:
                continue
            for name, wanted in self.head_values(head).items():
                named = {wanted} if isinstance(wanted, str) else set(wanted)
                nothing = tuple(filter(None, [fields[name].nothing]))
                less[name] = tuple(choice for choice in less.get(name, ()) if choice not in named) or nothing
        if less == said:
            return None
        try:
            return self.build_prompt(said), self.build_prompt(less)
        except InputError:
            return None

    def expected_regions(self, word: str) -> tuple[str, ...]:
        """Names of the regions where the image should show what `word` says; empty where there is no such claim."""
        mentions = [mention for mention in self.lexicon.read(word).mentions if mention.term.regions]
        places = [mention for mention in mentions if mention.term.place]
        return tuple(dict.fromkeys(region for mention in places or mentions for region in mention.term.regions))

    def head(self, name: str) -> Head:
        """The head called `name`. Raises InputError naming the heads there are."""
        for head in self.heads:
            if head.name == name:
                return head
        raise InputError(f"unknown head {name!r}; {self.name} has {', '.join(head.name for head in self.heads)}")

    @property
    def aspects(self) -> dict[str, tuple[str, ...]]:
        """Part of a report -> names of its heads; empty where this domain's reports have no parts."""
        found: dict[str, tuple[str, ...]] = {}
        for head in self.heads:
            if head.aspect:
                found[head.aspect] = (*found.get(head.aspect, ()), head.name)
        return found

    def head_prompt(self, name: str) -> str:
        """The canonical prompt that asks for one head. Raises InputError on an unknown head."""
        return self.build_prompt(self.head_values(self.head(name).name))

    def corpus(self, count: int, seed: int) -> list[str]:
        """`count` captions that cover the vocabulary, for training the tokenizer; a function of count and seed."""
        rng = random.Random(f"{self.name} corpus {seed}")
        captions = list(self.validation_prompts()) + [example.prompt for example in self.examples]
        captions += [self.head_prompt(head.name) for head in self.heads]
        phrases = [f"an image with {phrase}" for phrase in self.lexicon.phrases]
        rng.shuffle(phrases)
        captions += phrases[: count // 3]
        while len(captions) < count:
            captions.append(self.caption(self.invented_record(rng), rng))
        return captions[:count]

    def checked(self, values: Values) -> dict[str, tuple[str, ...]]:
        """Menu choices as tuples in the order of each field's choices, fields that state nothing left out.

        Raises InputError on an unknown field or choice, or on several choices for a field that takes one.
        """
        fields = {field.name: field for field in self.fields}
        checked = {}
        for name, value in values.items():
            if name not in fields:
                raise InputError(f"unknown field {name!r}; {self.name} has {', '.join(fields)}")
            if chosen := _checked_choices(fields[name], value):
                checked[name] = chosen
        return checked


def _checked_choices(field: Field, value: object) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        given: list[object] = [value]
    elif isinstance(value, Iterable):
        given = list(value)
    else:
        given = [str(value)]
    given = [choice for choice in given if choice not in (None, "", NOT_STATED)]
    for choice in given:
        if choice not in field.choices:
            raise InputError(f"{choice!r} is not a choice of {field.name!r}; allowed: {', '.join(field.choices)}")
    if len(set(given)) > 1 and not field.multiple:
        raise InputError(f"{field.name!r} takes one choice, found {len(given)}: {', '.join(map(str, given))}")
    return tuple(choice for choice in field.choices if choice in given)


def _choices(reading: Reading, denied: bool) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {}
    for mention in reading.mentions:
        if mention.term.field and mention.denied == denied:
            found.setdefault(mention.term.field, {}).update(dict.fromkeys(mention.term.choices))
        if not denied:
            for field, choice in mention.term.also:
                found.setdefault(field, {})[choice] = None
    return {field: tuple(choices) for field, choices in found.items()}


def number(value: object) -> float | None:
    """A record's number, or None where it is unknown (None, NaN, not a number)."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def items(value: object) -> list:
    """A record's list, given as a list or as JSON; empty where there is none."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else []
    return list(value) if isinstance(value, list | tuple) else []


def nearest_age(value: object, ages: Sequence[int]) -> int | None:
    """The stated age nearest to a record's age in years; None where it is unknown or 0."""
    years = number(value)
    return None if years is None or years <= 0 else min(ages, key=lambda age: abs(age - years))


def pick(rng: random.Random, weighted: Mapping[str, float]) -> str:
    """One of the keys, drawn with its weight."""
    return rng.choices(list(weighted), weights=list(weighted.values()))[0]


def count_tokens(text: str) -> int:
    """Words and punctuation marks of a caption."""
    return len(_CAPTION_TOKEN.findall(text))


def shortened(parts: Sequence[str], word: Callable[[Sequence[str]], str]) -> str:
    """`word(parts)`, with the last parts left out until the caption is short enough."""
    kept = list(parts)
    while kept and count_tokens(word(kept)) > CAPTION_TOKENS:
        kept.pop()
    return word(kept)


def person(age: str | None, sex: str | None, group: str | None = None) -> str:
    """ "55 year old woman", "man", "15 year old girl", "child"; empty when nothing is known. No article."""
    young = group == "child" or (age is not None and int(age) < CHILD_BELOW_YEARS)
    grown = group == "adult" or (age is not None and not young)
    if sex is not None and (young or grown):
        noun = {"male": ("man", "boy"), "female": ("woman", "girl")}[sex][young]
    elif sex is not None:
        noun = f"{sex} patient"
    else:
        noun = "child" if young else "adult" if grown else ""
    return f"{age} year old {noun}" if age is not None else noun
