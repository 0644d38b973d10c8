"""Paediatric chest X-rays as Mendeley Data and its copies distribute them (Kermany et al. 2018, CC BY 4.0).

Children of 1 to 5 years, AP; no age and no sex is published. The publisher's division into train, val and test is not
kept: it puts images of one child on two sides.
"""

import re
from pathlib import Path
from typing import Any

from medviz.errors import InputError
from train.datasets.originals import Original, complete, folder_in

SOURCE = "Kermany 2018 paediatric"
LICENCE = "CC BY 4.0"
CAUSES = {"bacteria": "bacterial pneumonia", "virus": "viral pneumonia"}

# One number may stand for a bacterial and for a viral image. Whether that is one child is unknown: both stay together.
_PNEUMONIA = re.compile(r"(person\d+)_(bacteria|virus)_\d+$")
_NORMAL = re.compile(r"(?:NORMAL(2)-)?(IM-\d+)(?:-\d+)+$")
_LATER_RELEASE = re.compile(r"(BACTERIA|VIRUS|NORMAL)-(\d+)-\d+$")


def describe(stem: str) -> tuple[str, list[str]] | None:
    """(patient_id, findings) of a file name without its suffix; None for a name of no published form."""
    if match := _PNEUMONIA.match(stem):
        return f"kermany_{match[1]}", ["pneumonia", CAUSES[match[2]]]
    if match := _NORMAL.match(stem):
        return f"kermany_{'N2-' if match[1] else ''}{match[2]}", ["no finding"]
    if match := _LATER_RELEASE.match(stem):
        cause = CAUSES.get(match[1].lower())
        return f"kermany_{match[1].lower()}{match[2]}", ["pneumonia", cause] if cause else ["no finding"]
    return None


def read_originals(folder: Path, allow_missing: bool = False) -> list[Original]:
    """Images and findings in `folder`, which is chest_xray or holds it.

    Expects {train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg (val may be absent), named person12_bacteria_34,
    person12_virus_34, IM-0115-0001 or NORMAL2-IM-0115-0001; BACTERIA-, VIRUS- and NORMAL-NUMBER-0001 in the later
    release. Raises InputError for what is not there, or for a name that does not fit its folder.
    """
    places = (folder, folder / "chest_xray", folder / "ChestXRay2017" / "chest_xray")
    root = next((place for place in places if (place / "train").is_dir()), None)
    if root is None:
        raise InputError(f"no train/ in {folder} or {folder}/chest_xray: expected chest_xray of Kermany et al. 2018")
    originals = []
    for part in (root / name for name in ("train", "val", "test") if name != "val" or (root / name).is_dir()):
        for kind in ("NORMAL", "PNEUMONIA"):
            place = folder_in(root, f"{part.name}/{kind}", f"{kind} images of Kermany et al. 2018")
            images = sorted(path for path in place.glob("*.jp*g") if not path.name.startswith("."))
            if not images:
                raise InputError(f"no *.jpeg in {place}")
            originals += [Original(_row(path, kind), path) for path in images]
    return complete(originals, allow_missing)


def _row(path: Path, kind: str) -> dict[str, Any]:
    described = describe(path.stem)
    if described is None or ("pneumonia" in described[1]) != (kind == "PNEUMONIA"):
        raise InputError(
            f"{path} has no name of an image in {kind}/: expected person1_bacteria_1, person1_virus_1, IM-0001-0001 or "
            "NORMAL2-IM-0001-0001"
        )
    return {
        "image_id": f"kermany_{path.stem}",
        "source": SOURCE,
        "patient_id": described[0],
        "view": "AP",
        "findings": described[1],
        "licence": LICENCE,
    }
