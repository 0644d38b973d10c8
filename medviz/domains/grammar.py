"""Reads free text with a lexicon of clinical phrases: longest match, plurals, ages and negation.

It knows no domain. What a phrase means is a `Term`; a domain brings the phrases.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

_TOKEN = re.compile(r"\d+|[^\W\d_]+|[,;.:()\[\]]")
_HARD_STOPS = frozenset(";.:()[]")


@dataclass(frozen=True)
class Term:
    """What one phrase means.

    field, choices: the prompt field it fills and the choices it stands for; an empty field is a phrase that is
        understood but decides nothing ("dermoscopic image").
    groundable: whether it is worth asking where the model looked when it read the phrase.
    negatable: whether "no" or "without" before it denies it; a site or an age is never denied.
    regions: names of the regions where the phrase should be seen; empty makes no claim.
    place: the phrase itself names a place, so its regions win over those of a finding beside it.
    also: further (field, choice) pairs that the phrase says, denied or not ("girl" says female and child).
    """

    field: str = ""
    choices: tuple[str, ...] = ()
    groundable: bool = False
    negatable: bool = True
    regions: tuple[str, ...] = ()
    place: bool = False
    also: tuple[tuple[str, str], ...] = ()


@dataclass
class Mention:
    """A term found in a text: characters start:end, and whether the text denies it."""

    term: Term
    start: int
    end: int
    denied: bool = False


@dataclass(frozen=True)
class Reading:
    """All terms of a text in order, and the words nothing is known about."""

    mentions: tuple[Mention, ...]
    unknown_words: tuple[str, ...]


def listed(text: str) -> list[str]:
    """The phrases of a list written with semicolons."""
    return text.split(";")


@lru_cache(maxsize=4096)
def fold(word: str) -> str:
    """Lower case and singular, so that "Opacities" and "opacity" are one word."""
    word = unicodedata.normalize("NFKC", word).casefold()
    if len(word) < 4 or word.endswith(("ss", "us", "is")) or not word.endswith("s"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "sses")) else word[:-1]


def fold_phrase(phrase: str) -> tuple[str, ...]:
    """The folded words of a phrase, punctuation left out: "milia-like cysts" -> ("milia", "like", "cyst")."""
    return tuple(fold(token) for token in _TOKEN.findall(phrase) if token[0].isalnum())


# Each phrase denies what follows it up to the end of its clause, or, with nothing to deny there, what stands before it.
_DENIALS = frozenset(
    map(
        fold_phrase,
        listed(
            "no;not;non;without;w/o;absent;absence of;free of;devoid of;negative for;lack;lacks;lacking;neither;never;"
            "excluding;except;rather than;instead of"
        ),
    )
)
# "hair-free": denies only what stands before it.
_DENIALS_BEFORE = frozenset({("free",)})
_LONGEST_DENIAL = max(map(len, _DENIALS))
_CLAUSE_STARTS = frozenset(
    map(fold, listed("with;showing;show;but;has;have;having;containing;contain;though;although"))
)
_LIST_ENDS = frozenset({"or", "nor"})
_IGNORED = frozenset(
    map(
        fold,
        listed(
            "a;an;the;his;her;of;with;and;or;nor;in;on;at;to;for;from;by;as;is;are;was;were;be;been;has;have;having;had;"
            "this;that;these;those;there;it;its;show;shows;showing;shown;seen;see;visible;present;presence;"
            "contain;contains;containing;include;includes;including;some;any;many;few;several;one;two;multiple;"
            "single;but;also;very;please;i;we;me;want;need;give;draw;make;generate;create;picture;photo;"
            "photograph;image;s;t;y;o;old;year;aged;age;though;although;where;which;who;taken;case;example;"
            "evidence;sign;small;large;well;both"
        ),
    )
)
_AGE_UNITS = frozenset({"year", "yr", "y", "yo"})
_OLDEST_YEARS = 120


class Lexicon:
    """Phrases and their terms. Phrases are folded, so one spelling covers case, plurals and hyphens.

    ages: the ages a prompt may state, in years; an age in a text becomes the nearest of them.
    age_also: what an age says besides ((field, choice) pairs), as `Term.also`.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        ages: Iterable[int] = (),
        age_also: Callable[[int], tuple[tuple[str, str], ...]] = lambda years: (),
    ) -> None:
        self.phrases = tuple(terms)
        self.ages = tuple(ages)
        self._age_also = age_also
        self._terms = {fold_phrase(phrase): term for phrase, term in terms.items()}
        self._longest = max((len(key) for key in self._terms), default=0)

    def read(self, text: str) -> Reading:
        """Find every term of `text`. Never raises on text."""
        tokens = [(fold(match.group()), match.start(), match.end()) for match in _TOKEN.finditer(text)]
        items: list[Mention | str] = []
        unknown: dict[str, str] = {}
        at = 0
        while at < len(tokens):
            mention, used = self._match(tokens, at)
            if mention is not None:
                items.append(mention)
            else:
                used, item = self._plain(tokens, at)
                items.append(item)
                word, start, end = tokens[at]
                if item == word and word[0].isalnum() and word not in _IGNORED:
                    unknown.setdefault(word, text[start:end])
            at += used
        _deny(items)
        return Reading(tuple(item for item in items if isinstance(item, Mention)), tuple(unknown.values()))

    def _match(self, tokens: list[tuple[str, int, int]], at: int) -> tuple[Mention | None, int]:
        words = [word for word, _, _ in tokens[at : at + max(self._longest, 5)]]
        for length in range(min(self._longest, len(words)), 0, -1):
            term = self._terms.get(tuple(words[:length]))
            if term is not None:
                return Mention(term, tokens[at][1], tokens[at + length - 1][2]), length
        years, used = _read_age(words)
        if years is None or not self.ages:
            return None, 1
        nearest = min(self.ages, key=lambda age: abs(age - years))
        term = Term("age", (str(nearest),), negatable=False, also=self._age_also(nearest))
        return Mention(term, tokens[at][1], tokens[at + used - 1][2]), used

    @staticmethod
    def _plain(tokens: list[tuple[str, int, int]], at: int) -> tuple[int, str]:
        words = tuple(word for word, _, _ in tokens[at : at + _LONGEST_DENIAL])
        for length in range(len(words), 0, -1):
            if words[:length] in _DENIALS:
                return length, "<deny>"
        if words[:1] in _DENIALS_BEFORE:
            return 1, "<deny before>"
        return 1, words[0]


def _read_age(words: list[str]) -> tuple[int | None, int]:
    """Years and words used, of "55 year old", "55yo", "aged 55"."""
    stated = words[0] in ("aged", "age") and len(words) > 1
    number = words[1] if stated else words[0]
    if not number.isdecimal() or len(number) > 3 or int(number) > _OLDEST_YEARS:
        return None, 1
    used = 2 if stated else 1
    has_unit = len(words) > used and words[used] in _AGE_UNITS
    if not (stated or has_unit):
        return None, 1
    used += has_unit
    used += len(words) > used and words[used] in ("old", "o")
    return int(number), used


def _deny(items: list[Mention | str]) -> None:
    """Mark the mentions that the text denies.

    A denial reaches to the end of its clause: a full stop, a bracket, "with", "but". A comma ends it too, unless the
    list goes on to an "or": "no hair, ruler or ink" denies three things, "no hair, ruler" denies one.
    """
    denying = False
    reached = False
    list_end = 0
    for at, item in enumerate(items):
        if isinstance(item, Mention):
            if item.term.field:
                item.denied = item.denied or (denying and item.term.negatable)
                reached = True
        elif item == "<deny>":
            if _has_target(items, at):
                denying, reached, list_end = True, False, _list_end(items, at)
            else:
                _deny_before(items, at)
        elif item == "<deny before>":
            _deny_before(items, at)
        elif item in _HARD_STOPS or (item == "," and at > list_end) or (item in _CLAUSE_STARTS and reached):
            denying = False


def _has_target(items: list[Mention | str], at: int) -> bool:
    for item in items[at + 1 :]:
        if isinstance(item, Mention):
            if item.term.field and item.term.negatable:
                return True
        elif item == "," or item in _HARD_STOPS or item == "<deny>":
            return False
    return False


def _deny_before(items: list[Mention | str], at: int) -> None:
    for item in reversed(items[:at]):
        if isinstance(item, Mention):
            if item.term.field and item.term.negatable:
                item.denied = True
                return
        elif item == "," or item in _HARD_STOPS:
            return


def _list_end(items: list[Mention | str], at: int) -> int:
    last = 0
    for index, item in enumerate(items[at + 1 :], start=at + 1):
        if isinstance(item, Mention):
            continue
        if item in _HARD_STOPS or item == "<deny>" or (item in _CLAUSE_STARTS and index > at + 1):
            break
        if item in _LIST_ENDS:
            last = index
    return last
