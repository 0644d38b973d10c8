"""What the adult films of Montgomery, Shenzhen and JSRT show and where, from their readers' short notes.

A reading is no box: it names sides and zones, so its finding gets a place in words (`finding_places`, see
`Radiology.caption`). Pulmonary tuberculosis with a place is captioned as the opacity that is seen there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from medviz.domains.lung_places import SIDES, box_locations, merged

MONTGOMERY, SHENZHEN, JSRT = "Montgomery (NLM)", "Shenzhen (NLM)", "JSRT"
SOURCES = (MONTGOMERY, SHENZHEN, JSRT)
SEXES = {"M": "male", "F": "female"}
LEAST_SUBTLETY = 3
"""Of JSRT nodules, 5 being obvious: those of 1 and 2 cannot be seen at 256 px."""

_SIDE_WORDS = {
    **dict.fromkeys(("right", "rt", "r"), ("right",)),
    **dict.fromkeys(("left", "lt", "l"), ("left",)),
    **dict.fromkeys(("bilateral", "bilaterally", "both"), SIDES),
}
_LEVEL_WORDS = {
    **dict.fromkeys(("upper", "apical", "apex", "apice", "apices"), "upper"),
    **dict.fromkeys(("mid", "middle"), "mid"),
    **dict.fromkeys(("lower", "basal", "base", "bases"), "lower"),
}
_LOBES = {"u": "upper", "m": "mid", "l": "lower"}
_LOBE = re.compile(r"([rl])([uml])l$")
_CLAUSES = re.compile(r"[,;.:/()]|\bwith\b|\bbut\b|\bas well as\b")
_SUBTLETY = re.compile(r"subtlety (\d)")
# A clause is passed over that speaks of another image or of what is not there.
_ELSEWHERE = re.compile(r"\b(no|without|prior|previous\w*|compar\w*|ago|history|h o|normal|unchanged)\b")
_FINDINGS = {
    "pleural effusion": re.compile(r"\b(effusion|pleural fluid|intrathoracic fluid)"),
    "cavity": re.compile(r"\bcavit"),
    "nodule": re.compile(r"\bnodule\b"),
    "lung opacity": re.compile(r"\b(ptb|tb|infiltrat|pneumonia|opaci|consolidat)"),
}
# Scars, calcifications and the pleura are no opacity of the kind that the word stands for.
_NO_OPACITY = re.compile(r"scar|calcif|pleur|fibro|granuloma|thicken|atelecta")


def places_of(clause: str) -> tuple[str, ...]:
    """Zones and lungs that a clause names: "bilateral upper field", "RUL", "left ... upper and middle fields".

    A level without a side names no place; a side without a level is the whole lung.
    """
    found: list[str] = []
    sides: tuple[str, ...] = ()
    levels: list[str] = []

    def close() -> None:
        named = [f"{level} zone" for level in levels] or ["lung"]
        found.extend(f"{side} {name}" for side, name in product(sides, named))

    for word in re.findall(r"[a-z]+", clause.lower()):
        lobe = _LOBE.match(word)
        if lobe:
            found.append(f"{_SIDE_WORDS[lobe[1]][0]} {_LOBES[lobe[2]]} zone")
        elif word in _SIDE_WORDS:
            if sides:
                close()
            sides, levels = _SIDE_WORDS[word], []
        elif word in _LEVEL_WORDS:
            levels.append(_LEVEL_WORDS[word])
    if sides:
        close()
    return merged(found)


def findings_of(report: str) -> dict[str, tuple[str, ...]]:
    """Finding -> its places, of a reading: "left PTB, left pleural effusion". Never raises on text.

    Only findings that are given a place; each clause speaks for itself.
    """
    found: dict[str, tuple[str, ...]] = {}
    for clause, finding in _clauses(report):
        if places := places_of(clause):
            found[finding] = merged((*found.get(finding, ()), *places))
    return found


def _clauses(report: str) -> Iterator[tuple[str, str]]:
    for clause in _CLAUSES.split(report.lower()):
        if _ELSEWHERE.search(clause):
            continue
        for finding, pattern in _FINDINGS.items():
            if pattern.search(clause) and not (finding == "lung opacity" and _NO_OPACITY.search(clause)):
                yield clause, finding


def read(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of one of SOURCES with its sex in a word, `finding_places`, and no box of a nodule too faint to see.

    Another source's record comes back as it is.
    """
    if record.get("source") not in SOURCES:
        return dict(record)
    findings, marked = json.loads(record.get("findings") or "[]"), json.loads(record.get("boxes") or "[]")
    report = str(record.get("report") or "")
    seen: dict[str, tuple[str, ...]] = {}
    if record["source"] == JSRT:
        subtlety = _SUBTLETY.search(report)
        if subtlety and int(subtlety[1]) < LEAST_SUBTLETY:
            marked = [box for box in marked if box["label"] != "nodule"]
        nodules = [place for box in marked if box["label"] == "nodule" for place in box_locations(box)]
        if nodules:
            seen["nodule"] = merged(nodules)
    elif "tuberculosis" in findings:
        seen = findings_of(report)
        if "lung opacity" in seen and "lung opacity" not in findings:
            findings.append("lung opacity")
        seen["tuberculosis"] = ()
    described = {**record, "findings": json.dumps(findings), "boxes": json.dumps(marked)}
    described["sex"] = SEXES.get(str(record.get("sex")), record.get("sex"))
    if seen:
        described["finding_places"] = json.dumps({finding: list(places) for finding, places in seen.items()})
    return described
