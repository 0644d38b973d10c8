"""Montgomery and Shenzhen tuberculosis sets as the National Library of Medicine distributes them (Jaeger et al. 2014).

Each image has a text file with sex, age and the reader's words. Its name ends in 1 where tuberculosis was found.
"""

import re
from pathlib import Path
from typing import Any

from medviz.errors import InputError
from train.datasets.originals import Original, age_years, complete, files_by_stem, folder_in
from train.datasets.readings import MONTGOMERY, SHENZHEN

LICENCE = "NLM public set (cite Jaeger et al. 2014)"
SHENZHEN_MASKS = " with masks CC BY-NC-SA 4.0 (Stirenko et al. 2018)"
SEXES = {"m": "male", "f": "female"}

_NAME = re.compile(r"(MCUCXR|CHNCXR)_(\d+)_([01])$")
_SEX = re.compile(r"\b(female|male|f|m)\b", re.IGNORECASE)
_AGE = re.compile(r"(\d+)\s*(y|m|d)", re.IGNORECASE)
_SAME_PATIENT = re.compile(r"same pt as (MCUCXR_\d+)", re.IGNORECASE)
# Word of a reading -> the finding it is published under.
_FINDINGS = {
    "atelectasis": "atelecta",
    "calcification": "calcif",
    "cavity": "cavit",
    "effusion": "effusion",
    "fibrosis": "fibro",
    "infiltration": "infiltrat",
    "pleural thickening": "pleural thicken",
    "pneumothorax": "pneumothora",
}


def read_montgomery(folder: Path, allow_missing: bool = False) -> list[Original]:
    """Images, readings and lung masks of MontgomerySet, or of the folder that holds it.

    Expects CXR_png/MCUCXR_0001_0.png, ClinicalReadings/MCUCXR_0001_0.txt and ManualMask/{left,right}Mask/. Raises
    InputError for what is not there, or for a name or a text of another form.
    """
    root = folder / "MontgomerySet" if (folder / "MontgomerySet").is_dir() else folder
    left, right = (
        files_by_stem(folder_in(root, f"ManualMask/{side}Mask", f"the {side} lungs of Montgomery"), "*.png")
        for side in ("left", "right")
    )
    originals = []
    for stem, image in _images(root, "MCUCXR").items():
        masks = {"lung_mask": (left[stem], right[stem])} if stem in left and stem in right else {}
        originals.append(Original(_row(root, stem, MONTGOMERY, LICENCE), image, masks))
    return _one_patient(complete(originals, allow_missing))


def read_shenzhen(folder: Path, allow_missing: bool = False) -> list[Original]:
    """Images and readings of ChinaSet_AllFiles, or of the folder that holds it, and lung masks where there are some.

    Expects CXR_png/CHNCXR_0001_0.png and ClinicalReadings/CHNCXR_0001_0.txt; mask/CHNCXR_0001_0_mask.png (Stirenko et
    al. 2018) may be absent. Raises InputError as `read_montgomery` does.
    """
    root = folder / "ChinaSet_AllFiles" if (folder / "ChinaSet_AllFiles").is_dir() else folder
    outlined = files_by_stem(root / "mask", "*_mask.png") if (root / "mask").is_dir() else {}
    originals = []
    for stem, image in _images(root, "CHNCXR").items():
        mask = outlined.get(f"{stem}_mask")
        row = _row(root, stem, SHENZHEN, LICENCE + (SHENZHEN_MASKS if mask else ""))
        originals.append(Original(row, image, {"lung_mask": mask} if mask else {}))
    return complete(originals, allow_missing)


def _images(root: Path, prefix: str) -> dict[str, Path]:
    images = files_by_stem(folder_in(root, "CXR_png", "the images of the NLM set"), "*.png")
    for stem, path in images.items():
        match = _NAME.match(stem)
        if match is None or match[1] != prefix:
            raise InputError(f"{path} has no name of an image of this set: expected {prefix}_0001_0.png")
    if not images:
        raise InputError(f"no *.png in {root / 'CXR_png'}")
    return dict(sorted(images.items()))


def _row(root: Path, stem: str, source: str, licence: str) -> dict[str, Any]:
    path = root / "ClinicalReadings" / f"{stem}.txt"
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read the reading {path}: {error}") from error
    sex, age, report = parse_reading(text, path)
    ill = stem.endswith("1")
    named = sorted(finding for finding, word in _FINDINGS.items() if word in report.lower())
    return {
        "image_id": f"nlm_{stem}",
        "source": source,
        "patient_id": f"nlm_{stem[:-2]}",
        "view": "PA",
        "age": age,
        "sex": sex,
        "findings": ["tuberculosis", *named] if ill else ["no finding"],
        "report": report if ill else None,
        "licence": licence,
    }


def parse_reading(text: str, path: Path) -> tuple[str | None, float | None, str]:
    """(sex, age in years, the reader's words) of a reading; `path` is named in the error.

    Both forms: "Patient's Sex: F / Patient's Age: 026Y / normal" and "male 45yrs / normal". Raises InputError for an
    empty text.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; expected sex, age and a reading")
    head = 2 if "age" in lines[0].lower() or "sex" in lines[0].lower() else 1
    top = " ".join(lines[:head]).replace("Patient's Sex", "").replace("Patient's Age", "")
    sex, age = _SEX.search(re.sub(r"\d+\s*\w*", " ", top)), _AGE.search(top)
    years = age_years(f"{age[1]}{age[2].upper()}") if age else None
    return SEXES[sex[1][0].lower()] if sex else None, years, " ".join(" ".join(lines[head:]).split())


def _one_patient(originals: list[Original]) -> list[Original]:
    """The patient of a later film of Montgomery is that of the film which its reading names."""
    same = {}
    for original in originals:
        named = _SAME_PATIENT.findall(str(original.row["report"] or ""))
        same[original.row["patient_id"]] = min([original.row["patient_id"], *(f"nlm_{name.upper()}" for name in named)])

    def first(patient: str) -> str:
        return patient if same.get(patient, patient) == patient else first(same[patient])

    return [Original({**o.row, "patient_id": first(o.row["patient_id"])}, o.image, o.masks, o.boxes) for o in originals]
