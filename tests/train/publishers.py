"""Small folders laid out as the publishers distribute theirs, with drawn pictures whose places can be found again."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ATTRIBUTES = ("globules", "milia_like_cyst", "negative_network", "pigment_network", "streaks")
ARTEFACTS = ("dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches")
DERMATOLOGY_HW = (90, 120)
LESION = (40, 30, 20, 16)
"""Left, top, width and height in pixels of the bright lesion in every dermoscopic picture."""
CYST = (2, 2, 9, 9)
"""A structure at the left edge, outside the central square."""


def picture(size_hw: tuple[int, int], *bright: tuple[int, int, int, int], colour: bool = True) -> Image.Image:
    """Dark noise with bright rectangles (left, top, width, height)."""
    rng = np.random.default_rng(size_hw[0] + sum(bright[0]) if bright else 0)
    pixels = rng.integers(10, 50, size_hw, np.uint8)
    for left, top, width, height in bright:
        pixels[top : top + height, left : left + width] = 230
    image = Image.fromarray(pixels)
    return image.convert("RGB") if colour else image


def mask(size_hw: tuple[int, int], *inside: tuple[int, int, int, int]) -> Image.Image:
    pixels = np.zeros(size_hw, np.uint8)
    for left, top, width, height in inside:
        pixels[top : top + height, left : left + width] = 255
    return Image.fromarray(pixels)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95) if path.suffix in (".jpg", ".jpeg") else image.save(path)


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return path


def make_ham10000(folder: Path, lesions: int = 24) -> Path:
    """Two images of every third lesion, one of the others, in two folders."""
    rows: list[list[object]] = []
    diagnoses = ("nv", "mel", "bkl", "bcc", "akiec", "vasc", "df")
    for lesion in range(lesions):
        for _ in range(2 if lesion % 3 == 0 else 1):
            name = f"ISIC_{24306 + len(rows):07d}"
            diagnosis = diagnoses[lesion % len(diagnoses)]
            age, sex = ("", "unknown") if lesion == 1 else (45.0 + lesion, "female")
            rows.append([f"HAM_{lesion:07d}", name, diagnosis, "histo", age, sex, "back" if lesion else "unknown"])
            part = f"HAM10000_images_part_{1 + len(rows) % 2}"
            save(picture(DERMATOLOGY_HW, LESION), folder / part / f"{name}.jpg")
            place = folder / "HAM10000_segmentations_lesion_tschandl"
            save(mask(DERMATOLOGY_HW, LESION), place / f"{name}_segmentation.png")
    header = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
    table(folder / "HAM10000_metadata.csv", header, rows)
    return folder


def make_isic2018(folder: Path, count: int = 4) -> Path:
    """Images ISIC_0000000 and on, each with globules in the lesion, a cyst outside the square and no streaks."""
    for i in range(count):
        name = f"ISIC_{i:07d}"
        save(picture(DERMATOLOGY_HW, LESION, CYST), folder / "ISIC2018_Task1-2_Training_Input" / f"{name}.jpg")
        lesion = folder / "ISIC2018_Task1_Training_GroundTruth" / f"{name}_segmentation.png"
        save(mask(DERMATOLOGY_HW, LESION), lesion)
        inside = {"globules": [LESION], "milia_like_cyst": [CYST]}
        for attribute in ATTRIBUTES:
            place = folder / "ISIC2018_Task2_Training_GroundTruth_v3" / f"{name}_attribute_{attribute}.png"
            save(mask(DERMATOLOGY_HW, *inside.get(attribute, [])), place)
    return folder


def make_nih(folder: Path, patients: int = 20, side_px: int = 64) -> Path:
    """One image a patient, three of patient 2, with a bright opacity boxed in the image's left half."""
    rows, boxes = [], []
    for patient in range(1, patients + 1):
        for follow_up in range(3 if patient == 2 else 1):
            name = f"{patient:08d}_{follow_up:03d}.png"
            labels = "Pleural_Thickening|Edema" if patient % 2 else "No Finding"
            view, gender = ("PA" if patient % 2 else "AP"), ("M" if patient % 3 else "F")
            rows.append([name, labels, follow_up, patient, "058Y" if patient > 1 else "411Y", gender, view])
            opacity = (8, 16, 12, 24)
            boxes.append([name, "Infiltrate", *(v * 1024 / side_px for v in opacity), "", "", ""])
            place = folder / f"images_{1 + patient % 2:03d}" / "images"
            save(picture((side_px, side_px), opacity, colour=False), place / name)
    header = [
        "Image Index",
        "Finding Labels",
        "Follow-up #",
        "Patient ID",
        "Patient Age",
        "Patient Gender",
        "View Position",
    ]
    table(folder / "Data_Entry_2017.csv", header, rows)
    box_header = ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", ""]
    table(folder / "BBox_List_2017.csv", box_header, boxes)
    return folder


def make_kermany(folder: Path, children: int = 20) -> Path:
    """Wide pictures with the bright side on the left; child 1 has images on two sides of the publisher's division."""
    names = {"train/PNEUMONIA": [], "test/PNEUMONIA": [], "train/NORMAL": [], "test/NORMAL": []}
    for child in range(1, children + 1):
        names["train/PNEUMONIA"].append(f"person{child}_bacteria_{child + 10}")
        names["train/NORMAL"].append(f"IM-{child:04d}-0001")
    names["test/PNEUMONIA"].append("person1_virus_6")
    names["test/NORMAL"] += ["NORMAL2-IM-0001-0001", "NORMAL2-IM-0001-0001-0002"]
    for place, stems in names.items():
        for stem in stems:
            save(picture((40, 60), (0, 0, 20, 40), colour=False), folder / "chest_xray" / place / f"{stem}.jpeg")
    return folder


def make_montgomery(folder: Path, side_px: int = 64) -> Path:
    """Patients 1 (healthy) and 2 (tuberculosis, right upper lobe), a later film of patient 2; masks of both lungs."""
    root = folder / "MontgomerySet"
    right, left = (8, 16, 16, 32), (40, 16, 16, 32)
    readings = {
        "MCUCXR_0001_0": "Patient's Sex: F\nPatient's Age: 026Y\nnormal",
        "MCUCXR_0002_1": "Patient's Sex: M\nPatient's Age: 061Y\ncavitary infiltrate in RUL; no effusion",
        "MCUCXR_0005_1": "Patient's Sex: M\nPatient's Age: 062Y\nno report (same pt as MCUCXR_0002_1)",
    }
    for stem, text in readings.items():
        save(picture((side_px, side_px), right, colour=False), root / "CXR_png" / f"{stem}.png")
        save(mask((side_px, side_px), right), root / "ManualMask" / "rightMask" / f"{stem}.png")
        save(mask((side_px, side_px), left), root / "ManualMask" / "leftMask" / f"{stem}.png")
        (root / "ClinicalReadings").mkdir(exist_ok=True)
        (root / "ClinicalReadings" / f"{stem}.txt").write_text(text)
    return folder


def make_shenzhen(folder: Path, side_px: int = 64) -> Path:
    """A healthy man, and a girl with tuberculosis of both upper fields whose film has a lung mask."""
    root = folder / "ChinaSet_AllFiles"
    readings = {
        "CHNCXR_0001_0": "male 45yrs\nnormal",
        "CHNCXR_0327_1": "female, 14 yrs \nPTB in the bilateral upper field",
    }
    for stem, text in readings.items():
        save(picture((side_px, side_px), (8, 16, 16, 32), colour=False), root / "CXR_png" / f"{stem}.png")
        (root / "ClinicalReadings").mkdir(exist_ok=True)
        (root / "ClinicalReadings" / f"{stem}.txt").write_text(text)
    save(mask((side_px, side_px), (8, 16, 16, 32)), root / "mask" / "CHNCXR_0327_1_mask.png")
    return folder


def make_jsrt(folder: Path) -> Path:
    """Two films with a nodule, one plain and one too faint, and one without; air is stored as high numbers."""
    rows = [
        "JPCLN001.IMG\t5\t15\t53\tMale\t1634\t692\tmalignant\tl.upper lobe\tlung cancer",
        "JPCLN002.IMG\t1\t10\t60\tFemale\t500\t1500\tbenign\tr.lower lobe\tgranuloma",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "CLNDAT_EN.txt").write_text("\n".join(rows) + "\n")
    (folder / "CNNDAT_EN.TXT").write_text("JPCNN001.IMG\t41\tFemale\tnon-nodule\n")
    film = np.full((2048, 2048), 4000, ">u2")
    film[600:800, 1540:1740] = 100
    for name in ("JPCLN001", "JPCLN002", "JPCNN001"):
        (folder / f"{name}.IMG").write_bytes(film.tobytes())
    return folder
