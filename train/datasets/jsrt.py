"""JSRT chest films with and without a nodule (Shiraishi et al. 2000), as the Japanese society distributes them.

2048 x 2048 pixels of 0.175 mm in files without a header, and a table of the nodules.
"""

import re
from pathlib import Path
from typing import Any

from medviz.errors import InputError
from train.datasets.originals import RAW_SIDE_PX, Original, age_years, complete, file_in
from train.datasets.readings import JSRT

LICENCE = "JSRT, research use (cite Shiraishi et al. 2000)"
PIXEL_MM = 0.175
LEAST_BOX = 0.03
"""Least side of a nodule's box as a share of the film."""
SEXES = {"male": "male", "female": "female"}

_IMAGE = re.compile(r"JPC[LN]N\d{3}\.IMG", re.IGNORECASE)


def read_originals(folder: Path, allow_missing: bool = False) -> list[Original]:
    """Images, nodules and their boxes in `folder`.

    Expects CLNDAT_EN.txt (file, subtlety, size in mm, age, sex, x, y, malignant or benign, position, diagnosis, parted
    by tabs), CNNDAT_EN.txt (the films without a nodule) and the images JPCLN001.IMG anywhere below. Raises InputError
    for what is not there or a row of another form.
    """
    nodules = file_in(folder, ("CLNDAT_EN.txt", "CLNDAT_EN.TXT", "*/CLNDAT_EN.*"), "the table of JSRT nodules")
    empty = file_in(
        folder, ("CNNDAT_EN.TXT", "CNNDAT_EN.txt", "*/CNNDAT_EN.*"), "the table of JSRT films without nodule"
    )
    images = {path.name.upper(): path for path in sorted(folder.rglob("*")) if _IMAGE.fullmatch(path.name)}
    originals = []
    for table, has_nodule in ((nodules, True), (empty, False)):
        for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            cells = [cell.strip() for cell in line.split("\t")]
            name = cells[0].upper()
            if not _IMAGE.fullmatch(name):
                continue
            try:
                row, boxes = _nodule(cells) if has_nodule else (_empty(cells), ())
            except (IndexError, ValueError) as error:
                raise InputError(f"{table}, line {number}: not a row of this table: {line!r}") from error
            row |= {"image_id": f"jsrt_{name[:-4]}", "patient_id": f"jsrt_{name[:-4]}", "licence": LICENCE}
            originals.append(Original(row, images.get(name, folder / name), boxes=boxes))
    if not originals:
        raise InputError(f"{nodules} and {empty} name no image such as JPCLN001.IMG")
    return complete(originals, allow_missing)


def _patient(age: str, sex: str) -> dict[str, Any]:
    return {"source": JSRT, "view": "PA", "age": age_years(age), "sex": SEXES.get(sex.lower())}


def _nodule(cells: list[str]) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    _, subtlety, size, age, sex, x, y, kind, position = cells[:9]
    side = max(float(size) / PIXEL_MM / RAW_SIDE_PX, LEAST_BOX)
    box = {
        "label": "nodule",
        "x": float(x) / RAW_SIDE_PX - side / 2,
        "y": float(y) / RAW_SIDE_PX - side / 2,
        "w": side,
        "h": side,
    }
    report = f"{kind} nodule, {size} mm, {position}; subtlety {int(subtlety)}"
    return {**_patient(age, sex), "findings": ["nodule"], "report": report}, (box,)


def _empty(cells: list[str]) -> dict[str, Any]:
    sex = next((cell for cell in cells[1:] if cell.lower() in SEXES), "")
    age = next((cell for cell in cells[1:] if cell.isdigit()), "")
    return {**_patient(age, sex), "findings": ["no finding"], "report": None}
