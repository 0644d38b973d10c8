"""ISIC 2018, tasks 1 and 2, as the challenge distributes them (Codella et al. 2018, arXiv 1902.03368).

Their images come without a diagnosis. Almost all of them are in ISIC 2019 too, whose two tables give it, with lesion,
age, sex and site. Labels of artefacts are tables of others: Bissoto et al. 2020 labelled the images by hand
(isic_bias.csv), Saremi et al. 2025 published labels that cover HAM10000 as well (isic2019_all.csv).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medviz.errors import InputError
from train.datasets.originals import Original, age_years, complete, files_by_stem, folder_in, known, read_table

SOURCE = "ISIC2018-Task1-2"
ARTEFACTS = ("dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches")
ATTRIBUTES = ("globules", "milia_like_cyst", "negative_network", "pigment_network", "streaks")
DIAGNOSES = {"MEL": "mel", "NV": "nv", "BCC": "bcc", "AK": "akiec", "BKL": "bkl", "DF": "df", "VASC": "vasc"}
"""Columns of ISIC 2019's ground truth; squamous cell carcinoma (SCC) and UNK have no counterpart and give null."""


def _image_id(text: str) -> str:
    return Path(text).stem.removesuffix("_downsampled")


def read_isic2019(metadata: Path | None, labels: Path | None) -> dict[str, dict[str, Any]]:
    """image_id -> {lesion_id, age, sex, site, diagnosis}, as far as the two tables of ISIC 2019 give them.

    metadata: ISIC_2019_Training_Metadata.csv. labels: ISIC_2019_Training_GroundTruth.csv.
    """
    known_of: dict[str, dict[str, Any]] = {}
    if metadata is not None:
        for row in read_table(metadata, ("image", "age_approx", "anatom_site_general", "lesion_id", "sex")):
            known_of[_image_id(row["image"])] = {
                "lesion_id": known(row["lesion_id"]),
                "age": age_years(row["age_approx"]),
                "sex": known(row["sex"]),
                "site": known(row["anatom_site_general"]),
            }
    if labels is not None:
        for row in read_table(labels, ("image", *DIAGNOSES)):
            diagnoses = [name for column, name in DIAGNOSES.items() if row[column] in ("1", "1.0")]
            known_of.setdefault(_image_id(row["image"]), {})["diagnosis"] = diagnoses[0] if diagnoses else None
    return known_of


def read_artefacts(table: Path, source: str) -> dict[str, dict[str, Any]]:
    """image_id -> {artefact_hair: 0..1, ..., artefact_source: `source`}, of a table with `image` and the artefacts."""
    labels = {}
    for row in read_table(table, ("image", *ARTEFACTS)):
        texts = {f"artefact_{name}": row[name] for name in ARTEFACTS}
        try:
            figures = {name: float(text) for name, text in texts.items()}
        except ValueError:
            figures = {"": math.nan}
        if not all(0 <= figure <= 1 for figure in figures.values()):
            raise InputError(f"{table}: the artefacts of {row['image']} must be numbers from 0 to 1, found {texts}")
        labels[_image_id(row["image"])] = {**figures, "artefact_source": source}
    return labels


def read_originals(
    folder: Path, known_of: Mapping[str, Mapping[str, Any]] | None = None, allow_missing: bool = False
) -> list[Original]:
    """Images with the masks of lesion and dermoscopic structures in `folder`.

    Expects ISIC2018_Task1-2_Training_Input/ISIC_*.jpg, ISIC2018_Task1_Training_GroundTruth/ISIC_*_segmentation.png and
    ISIC2018_Task2_Training_GroundTruth_v3/ISIC_*_attribute_NAME.png (any version). known_of: see read_isic2019.
    Raises InputError for what is not there.
    """
    images = files_by_stem(folder_in(folder, "ISIC2018_Task1-2_Training_Input", "images of ISIC 2018"), "ISIC_*.jpg")
    lesions = folder_in(folder, "ISIC2018_Task1_Training_GroundTruth", "lesion masks of ISIC 2018")
    structures = folder_in(folder, "ISIC2018_Task2_Training_GroundTruth*", "masks of structures of ISIC 2018")
    if not images:
        raise InputError(f"no ISIC_*.jpg in {folder}/ISIC2018_Task1-2_Training_Input")
    originals = []
    for name, image in sorted(images.items()):
        found = dict((known_of or {}).get(name, {}))
        row = {"image_id": name, "source": SOURCE, **found, "lesion_id": found.get("lesion_id") or name}
        masks = {"lesion_mask": lesions / f"{name}_segmentation.png"}
        masks |= {f"attribute_{a}_mask": structures / f"{name}_attribute_{a}.png" for a in ATTRIBUTES}
        originals.append(Original(row, image, masks))
    return complete(originals, allow_missing)
