"""HAM10000 as the Harvard Dataverse distributes it (Tschandl et al. 2018, doi 10.1038/sdata.2018.161)."""

from pathlib import Path

from medviz.errors import InputError
from train.datasets.originals import Original, age_years, complete, file_in, files_by_stem, folder_in, known, read_table

SOURCE = "HAM10000"
DIAGNOSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def read_originals(folder: Path, allow_missing: bool = False) -> list[Original]:
    """Images, diagnoses and lesion masks in `folder`.

    Expects HAM10000_metadata (or .csv, .tab) with lesion_id, image_id, dx, dx_type, age, sex, localization; the images
    ISIC_*.jpg anywhere below (HAM10000_images_part_1 and _2, or one folder); and
    HAM10000_segmentations_lesion_tschandl/ISIC_*_segmentation.png. Raises InputError for what is not there.
    """
    columns = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
    names = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")
    table = file_in(folder, names, "the table of HAM10000")
    segmentations = folder_in(folder, "HAM10000_segmentations_lesion_tschandl*", "lesion masks of HAM10000")
    images = files_by_stem(folder, "ISIC_*.jpg")
    masks = files_by_stem(segmentations, "ISIC_*_segmentation.png")
    originals = []
    for row in read_table(table, columns):
        name, mask = row["image_id"], f"{row['image_id']}_segmentation"
        if row["dx"] not in DIAGNOSES:
            raise InputError(f"{table}: {name} has the diagnosis {row['dx']!r}; expected one of {DIAGNOSES}")
        columns_of_image = {
            "image_id": name,
            "source": SOURCE,
            "lesion_id": row["lesion_id"],
            "diagnosis": row["dx"],
            "diagnosis_method": known(row["dx_type"]),
            "age": age_years(row["age"]),
            "sex": known(row["sex"]),
            "site": known(row["localization"]),
        }
        image = images.get(name, folder / "HAM10000_images_part_1" / f"{name}.jpg")
        originals.append(
            Original(columns_of_image, image, {"lesion_mask": masks.get(mask, segmentations / f"{mask}.png")})
        )
    return complete(originals, allow_missing)
