"""Montgomery, Shenzhen and JSRT: publishers' folders, readings as places, outlines, and crops."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medviz.domains import get_domain
from medviz.errors import InputError
from tests.train import publishers
from train.datasets import nlm
from train.datasets.cropping import cropped_film
from train.datasets.prepare import PrepareConfig, run
from train.datasets.readings import findings_of, places_of, read
from train.datasets.split import SPLITS, Split, open_split
from train.datasets.structures import open_structures

RADIOLOGY = get_domain("radiology")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the three publishers' folders."""
    root = tmp_path_factory.mktemp("films")
    run(
        PrepareConfig(
            domain="radiology",
            out=root / "out",
            montgomery=publishers.make_montgomery(root / "montgomery"),
            shenzhen=publishers.make_shenzhen(root / "shenzhen"),
            jsrt=publishers.make_jsrt(root / "jsrt"),
        )
    )
    return root / "out"


def found(out: Path, image_id: str) -> tuple[Split, int]:
    splits = (open_split("radiology", name, out) for name in SPLITS)
    return next((s, i) for s in splits for i, record in enumerate(s.records) if record["image_id"] == image_id)


def record_of(split: Split, index: int) -> dict[str, object]:
    return split.records[index]


def test_every_film_is_there_with_its_patient_once(prepared: Path) -> None:
    splits = {name: open_split("radiology", name, prepared) for name in SPLITS}
    assert sum(map(len, splits.values())) == 3 + 2 + 3
    first, later = (found(prepared, f"nlm_MCUCXR_{name}") for name in ("0002_1", "0005_1"))
    assert first[0].name == later[0].name
    assert first[0].records[first[1]]["patient_id"] == later[0].records[later[1]]["patient_id"]


def test_a_montgomery_reading_gives_sex_age_findings_and_places(prepared: Path) -> None:
    split, index = found(prepared, "nlm_MCUCXR_0002_1")
    record = split.records[index]
    assert (record["sex"], record["age"], record["view"]) == ("male", 61.0, "PA")
    assert set(json.loads(record["findings"])) >= {"tuberculosis", "cavity", "infiltration", "lung opacity"}
    seen = json.loads(record["finding_places"])
    assert seen["cavity"] == seen["lung opacity"] == ["right upper zone"]
    assert "pleural effusion" not in seen
    healthy = record_of(*found(prepared, "nlm_MCUCXR_0001_0"))
    assert json.loads(healthy["findings"]) == ["no finding"]
    assert healthy["report"] is None


def test_both_lung_masks_become_one_and_right_stays_on_the_left_of_the_image(prepared: Path) -> None:
    split, index = found(prepared, "nlm_MCUCXR_0001_0")
    mask = split.mask(index, "lung_mask", 64)
    assert mask is not None
    assert mask[32, 16]
    assert mask[32, 48]
    assert not mask[32, 32]
    assert split.image(index, 64)[32, 16, 0] > 180 > split.image(index, 64)[32, 48, 0]


def test_a_shenzhen_film_has_its_mask_where_one_was_drawn(prepared: Path) -> None:
    ill, healthy = (found(prepared, f"nlm_CHNCXR_{name}") for name in ("0327_1", "0001_0"))
    assert ill[0].records[ill[1]]["lung_mask"]
    assert not healthy[0].records[healthy[1]]["lung_mask"]
    assert ill[0].records[ill[1]]["age"] == 14.0
    assert ill[0].records[ill[1]]["sex"] == "female"


def test_a_jsrt_nodule_is_bright_inside_its_box_and_a_faint_one_is_not_named(prepared: Path) -> None:
    split, index = found(prepared, "jsrt_JPCLN001")
    record = split.records[index]
    (box,) = json.loads(record["boxes"])
    image = split.image(index, 256)[..., 0]
    row, column = int((box["y"] + box["h"] / 2) * 256), int((box["x"] + box["w"] / 2) * 256)
    assert image[row, column] > 230
    assert image[10, 10] < 20
    assert json.loads(record["finding_places"]) == {"nodule": ["left upper zone"]}
    assert "nodule in the left upper zone" in {
        part.strip() for k in range(40) for part in RADIOLOGY.caption(record, random.Random(k)).split(",")
    }
    faint = record_of(*found(prepared, "jsrt_JPCLN002"))
    assert json.loads(faint["boxes"]) == []
    assert "finding_places" not in faint
    assert not any("nodule" in RADIOLOGY.caption(faint, random.Random(k)) for k in range(40))


@pytest.mark.parametrize(
    ("clause", "places"),
    [
        ("PTB in the left upper field", ("left upper zone",)),
        ("PTB in the bilateral upper fields", ("right upper zone", "left upper zone")),
        ("Left secondary PTB in the upper and middle fields", ("left upper zone", "left mid zone")),
        ("right upper and left lower field PTB", ("right upper zone", "left lower zone")),
        ("cavitary infiltrate in RUL", ("right upper zone",)),
        ("bilateral PTB", ("right lung", "left lung")),
        ("PTB in the upper field", ()),
        ("STB", ()),
    ],
)
def test_places_of_a_clause(clause: str, places: tuple[str, ...]) -> None:
    assert places_of(clause) == places


@pytest.mark.parametrize(
    ("report", "seen"),
    [
        ("left PTB, right pleural effusion", {"lung opacity": ("left lung",), "pleural effusion": ("right lung",)}),
        ("bilateral PTB, left pleurisy", {"lung opacity": ("right lung", "left lung")}),
        ("inactive appearing scars in LUL", {}),
        ("no infiltrate in the right lung", {}),
    ],
)
def test_each_clause_of_a_reading_speaks_for_itself(report: str, seen: dict[str, tuple[str, ...]]) -> None:
    assert findings_of(report) == seen


def test_tuberculosis_is_captioned_as_what_is_seen_and_where() -> None:
    record = read({"source": "Shenzhen (NLM)", "findings": '["tuberculosis"]', "report": "PTB in the left upper field"})
    captions = {RADIOLOGY.caption(record, random.Random(k)) for k in range(60)}
    assert any("lung opacity in the left upper zone, tuberculosis" in caption for caption in captions)
    assert RADIOLOGY.labels(record)["opacity"] == 1.0
    assert RADIOLOGY.labels(record)["normal"] == 0.0


def test_another_source_s_record_is_left_alone() -> None:
    record = {
        "source": "NIH ChestX-ray14",
        "findings": '["nodule"]',
        "report": "PTB in the left upper field",
        "sex": "M",
    }
    assert read(record) == record


def test_extra_folders_follow_the_domain_s_own_images(prepared: Path, tmp_path: Path) -> None:
    for folder, name in (("radiology", "validation"), ("more", "train")):
        (tmp_path / folder).mkdir()
        for path in (prepared / "radiology").glob(f"{name}-*.parquet"):
            table = pq.read_table(path)
            pq.write_table(table, tmp_path / folder / path.name.replace(name, "train"))
    own, both = (open_split("radiology", "train", tmp_path, extra) for extra in ((), ("more",)))
    assert both.records[: len(own)] == own.records
    assert len(both) > len(own)
    with pytest.raises(InputError, match=r"train-.*parquet in .*absent"):
        open_split("radiology", "train", tmp_path, ("absent",))


@pytest.mark.parametrize(
    ("text", "expected"), [("male 45yrs\nnormal", ("male", 45.0)), ("F, 013D\nPTB", ("female", 0.04))]
)
def test_both_forms_of_a_reading_s_head(text: str, expected: tuple[str, float]) -> None:
    sex, age, _ = nlm.parse_reading(text, Path("reading.txt"))
    assert sex == expected[0]
    assert age == pytest.approx(expected[1], abs=0.01)


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    folder = publishers.make_montgomery(tmp_path)
    (folder / "MontgomerySet" / "ClinicalReadings" / "MCUCXR_0001_0.txt").write_text("")
    with pytest.raises(InputError, match=r"MCUCXR_0001_0\.txt is empty"):
        nlm.read_montgomery(folder)
    with pytest.raises(InputError, match="CXR_png"):
        nlm.read_shenzhen(tmp_path)


def test_the_cardiothoracic_ratio_is_that_of_the_outlines(tmp_path: Path) -> None:
    def png(first: int, last: int) -> dict[str, object]:
        mask = np.zeros((64, 64), np.uint8)
        mask[10:50, first:last] = 255
        stream = io.BytesIO()
        Image.fromarray(mask).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    outlines = {"right lung": png(4, 24), "left lung": png(40, 60), "heart": png(22, 50)}
    rows = [{"image_id": "one", "structure": name, "mask": mask} for name, mask in outlines.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "structures-train.parquet")
    structures = open_structures(".", "train", tmp_path)
    assert structures.cardiothoracic_ratio("one", 64) == pytest.approx(28 / 56)
    with pytest.raises(InputError, match="aorta"):
        structures.mask("one", "aorta", 64)


def test_a_crop_moves_picture_mask_and_box_alike() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    image[40:60, 70:90] = 255
    box = {"label": "nodule", "x": 70 / 128, "y": 40 / 128, "w": 20 / 128, "h": 20 / 128}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        cut, (mask,), record = cropped_film(image, [image[..., 0] > 0], {"boxes": json.dumps([box])}, rng, share=0.2)
        (moved,) = json.loads(record["boxes"])
        rows, columns = np.nonzero(cut[..., 0] > 127)
        assert columns.min() / 128 == pytest.approx(moved["x"], abs=0.012)
        assert rows.min() / 128 == pytest.approx(moved["y"], abs=0.012)
        assert (mask == (cut[..., 0] > 127)).mean() > 0.99
