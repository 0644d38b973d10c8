"""From folders as the publishers lay them out to shards that every stage reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medviz.errors import InputError
from tests.train import publishers
from tests.train.publishers import ARTEFACTS, DERMATOLOGY_HW, LESION
from train.__main__ import main
from train.datasets import kermany, nih_chestxray14, shards
from train.datasets.originals import Frame, Original, age_years, read_table
from train.datasets.prepare import PrepareConfig, limited, run
from train.datasets.split import SPLITS, Split, boxes, open_split

Folders = dict[str, Path]


@pytest.fixture(autouse=True)
def _labels_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the columns say, not what pictures of noise bear out."""
    monkeypatch.setattr("train.datasets.split.confirm_hair", lambda records, lengths: 0)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """One folder a publisher; read only: copy what a test changes."""
    root = tmp_path_factory.mktemp("publishers")
    return {
        "ham10000": publishers.make_ham10000(root / "ham10000"),
        "isic2018": publishers.make_isic2018(root / "isic2018"),
        "nih": publishers.make_nih(root / "nih"),
        "kermany": publishers.make_kermany(root / "kermany"),
    }


def config(domain: str, folders: Folders, out: Path, **options: Any) -> PrepareConfig:
    names = {"dermatology": ("ham10000", "isic2018"), "radiology": ("nih", "kermany")}[domain]
    return PrepareConfig(domain=domain, out=out, workers=2, **{name: folders[name] for name in names}, **options)


@pytest.fixture(scope="module")
def prepared(originals: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shards of both domains."""
    out = tmp_path_factory.mktemp("prepared")
    tables = out.parent / "tables"
    header = ["", "image", *ARTEFACTS, "label"]
    by_hand = [[i, f"ISIC_{i:07d}.png", 0, 1, 0, 0, 1, 0, 0, 0] for i in range(2)]
    manual = publishers.table(tables / "isic_bias.csv", header, by_hand, delimiter=";")
    others = [["ISIC_0000000", *[0] * 7], ["ISIC_0024306", 1, 0, 0, 0, 0, 0, 0]]
    rl4med = publishers.table(tables / "isic2019_all.csv", ["image", *ARTEFACTS], others)
    header = ["image", "age_approx", "anatom_site_general", "lesion_id", "sex"]
    people = [["ISIC_0000000_downsampled", 30.0, "anterior torso", "MSK4_1", "male"]]
    people += [["ISIC_0000001", 30.0, "anterior torso", "MSK4_1", "male"]]
    metadata = publishers.table(tables / "metadata.csv", header, people)
    header = ["image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    diagnoses = [["ISIC_0000000_downsampled", *"100000000"], ["ISIC_0000001", *"000000010"]]
    labels = publishers.table(tables / "labels.csv", header, diagnoses)
    named = {"artefacts_manual": manual, "artefacts_rl4med": rl4med}
    run(config("dermatology", originals, out, **named, isic2019_metadata=metadata, isic2019_labels=labels))
    run(config("radiology", originals, out))
    return out


def everything(out: Path, domain: str) -> dict[str, tuple[Split, int]]:
    """image_id -> its split and place there."""
    splits = [open_split(domain, name, out) for name in SPLITS]
    return {record["image_id"]: (split, i) for split in splits for i, record in enumerate(split.records)}


def record(out: Path, domain: str, image_id: str) -> dict[str, Any]:
    split, i = everything(out, domain)[image_id]
    return split.records[i]


@pytest.mark.parametrize(("domain", "count"), [("dermatology", 32 + 4), ("radiology", 22 + 43)])
def test_every_image_is_in_one_split_and_no_group_in_two(prepared: Path, domain: str, count: int) -> None:
    splits = [open_split(domain, name, prepared) for name in SPLITS]
    assert sum(len(split) for split in splits) == count == len(everything(prepared, domain))
    assert all(len(split) for split in splits)
    groups = [set(split.groups) for split in splits]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert len(groups[0]) > len(groups[1]) + len(groups[2])


def test_groups_fall_to_the_splits_in_the_shares_meant() -> None:
    drawn = [shards.split_of(f"HAM_{i:07d}") for i in range(20000)]
    for split, share in zip(SPLITS, (0.83, 0.08, 0.09), strict=True):
        assert abs(drawn.count(split) / len(drawn) - share) < 0.01
    # Fixed for good: a group that changed its split would carry what a shipped model learned into the test images.
    assert [shards.split_of("HAM_0000001"), shards.split_of("kermany_person7")] == ["test", "train"]


def test_a_split_holds_both_halves_of_reward_and_judge() -> None:
    # Both come from a hash of the group; were it the same one, a split could hold one half only.
    names = [f"HAM_{i:07d}" for i in range(3000)]
    pictures = [{"bytes": b"", "path": ""}] * 3000
    table = pa.table({"image": pictures, "image_id": names, "lesion_id": names})
    halves = dict(zip(names, Split("dermatology", "train", table).halves.tolist(), strict=True))
    for split in SPLITS:
        mine = [halves[name] for name in names if shards.split_of(name) == split]
        assert 0.38 < sum(mine) / len(mine) < 0.62


def test_shards_open_with_datasets_and_decode(prepared: Path, tmp_path: Path) -> None:
    files = {split: str(prepared / "dermatology" / f"{split}-*.parquet") for split in SPLITS}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    first = loaded["train"][0]
    assert (first["image"].size, first["image"].mode, first["image"].format) == ((256, 256), "RGB", "JPEG")
    assert (first["lesion_mask"].size, first["lesion_mask"].mode) == ((256, 256), "1")
    chest = load_dataset("parquet", data_files=str(prepared / "radiology" / "test-*.parquet"), cache_dir=str(tmp_path))
    assert (chest["train"][0]["image"].size, chest["train"][0]["image"].mode) == ((256, 256), "L")


def test_columns_and_types_are_those_of_the_schema(prepared: Path) -> None:
    picture = "struct<bytes: binary, path: string>"
    names = ["image_id", "source", "lesion_id", "diagnosis", "diagnosis_method", "age", "sex", "site"]
    names += ["image", "lesion_mask"]
    names += [f"artefact_{name}" for name in ARTEFACTS] + ["artefact_source"]
    names += [f"attribute_{name}_mask" for name in publishers.ATTRIBUTES]
    schema = pq.read_schema(next((prepared / "dermatology").glob("train-*.parquet")))
    assert schema.names == names
    kinds = {name: str(schema.field(name).type) for name in names}
    assert kinds["image"] == kinds["lesion_mask"] == kinds["attribute_streaks_mask"] == picture
    assert kinds["age"] == kinds["artefact_hair"] == "float"
    schema = pq.read_schema(next((prepared / "radiology").glob("train-*.parquet")))
    names = ["image", "image_id", "source", "patient_id", "view", "age", "sex", "findings", "report", "boxes"]
    names += ["lung_mask", "licence"]
    assert schema.names == names
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == features["lung_mask"] == {"_type": "Image"}


def test_columns_of_ham10000(prepared: Path) -> None:
    first = record(prepared, "dermatology", "ISIC_0024306")
    expected = {"source": "HAM10000", "lesion_id": "HAM_0000000", "diagnosis": "nv", "diagnosis_method": "histo"}
    expected |= {"age": 45.0, "sex": "female", "site": None, "lesion_mask": True, "attribute_globules_mask": False}
    assert expected.items() <= first.items()
    assert (first["artefact_dark_corner"], first["artefact_hair"], first["artefact_source"]) == (1, 0, "rl4med")
    unknown = record(prepared, "dermatology", "ISIC_0024308")
    assert (unknown["lesion_id"], unknown["age"], unknown["sex"], unknown["site"]) == (
        "HAM_0000001",
        None,
        None,
        "back",
    )
    assert (unknown["artefact_hair"], unknown["artefact_source"]) == (None, None)


def test_columns_of_isic2018(prepared: Path) -> None:
    first, second, third = (record(prepared, "dermatology", f"ISIC_000000{i}") for i in range(3))
    expected = {"source": "ISIC2018-Task1-2", "lesion_id": "MSK4_1", "diagnosis": "mel", "age": 30.0, "sex": "male"}
    assert (expected | {"site": "anterior torso", "diagnosis_method": None}).items() <= first.items()
    assert (first["artefact_hair"], first["artefact_ruler"], first["artefact_source"]) == (1, 1, "manual"), (
        "by hand wins"
    )
    assert second["diagnosis"] is None, "squamous cell carcinoma has no counterpart"
    assert (third["lesion_id"], third["diagnosis"], third["age"]) == ("ISIC_0000002", None, None)
    shown = {name: first[f"attribute_{name}_mask"] for name in publishers.ATTRIBUTES}
    # The cyst lies outside the central square, streaks are annotated as absent.
    assert shown == {name: name == "globules" for name in publishers.ATTRIBUTES}


def test_columns_of_nih(prepared: Path) -> None:
    first, second = (record(prepared, "radiology", f"nih_0000000{i}_000") for i in (1, 2))
    assert (first["source"], first["patient_id"], first["view"]) == ("NIH ChestX-ray14", "nih_1", "PA")
    assert (first["age"], second["age"]) == (None, 58.0), "nobody is 411 years old"
    assert (first["sex"], record(prepared, "radiology", "nih_00000003_000")["sex"]) == ("male", "female")
    assert first["findings"] == '["edema", "pleural thickening"]'
    assert second["findings"] == '["no finding"]'
    assert (first["report"], first["lung_mask"]) == (None, False)
    assert first["licence"] == "NIH Clinical Center, unrestricted use with attribution"
    assert len({record(prepared, "radiology", f"nih_00000002_00{i}")["patient_id"] for i in range(3)}) == 1


def test_columns_of_kermany(prepared: Path) -> None:
    bacterial, viral = (record(prepared, "radiology", f"kermany_person1_{n}") for n in ("bacteria_11", "virus_6"))
    expected = {"source": "Kermany 2018 paediatric", "patient_id": "kermany_person1", "view": "AP", "age": None}
    assert (expected | {"findings": '["pneumonia", "bacterial pneumonia"]', "boxes": "[]"}).items() <= bacterial.items()
    assert (
        expected | {"findings": '["pneumonia", "viral pneumonia"]', "licence": "CC BY 4.0"}
    ).items() <= viral.items()
    normal = record(prepared, "radiology", "kermany_NORMAL2-IM-0001-0001-0002")
    assert (normal["patient_id"], normal["findings"]) == ("kermany_N2-IM-0001", '["no finding"]')
    assert record(prepared, "radiology", "kermany_IM-0001-0001")["patient_id"] == "kermany_IM-0001"


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("BACTERIA-1008087-0001", ("kermany_bacteria1008087", ["pneumonia", "bacterial pneumonia"])),
        ("VIRUS-1027357-0002", ("kermany_virus1027357", ["pneumonia", "viral pneumonia"])),
        ("NORMAL-28501-0001", ("kermany_normal28501", ["no finding"])),
        ("person12_fungus_3", None),
    ],
)
def test_names_of_the_later_kermany_release(stem: str, expected: tuple[str, list[str]] | None) -> None:
    assert kermany.describe(stem) == expected


def test_the_lesion_is_where_the_crop_puts_it_in_image_and_mask(prepared: Path) -> None:
    split, i = everything(prepared, "dermatology")["ISIC_0024306"]
    bright, inside = split.image(i, 256)[..., 1] > 128, split.mask(i, "lesion_mask", 256)
    assert inside is not None
    height, width = DERMATOLOGY_HW
    scale, left = 256 / height, (width - height) // 2
    expected = np.zeros((256, 256), bool)
    x, y, w, h = LESION
    expected[round(y * scale) : round((y + h) * scale), round((x - left) * scale) : round((x + w - left) * scale)] = (
        True
    )
    for found in (bright, inside):
        assert (found & expected).sum() / (found | expected).sum() > 0.95


def test_a_structure_has_its_own_mask_in_the_same_place(prepared: Path) -> None:
    split, i = everything(prepared, "dermatology")["ISIC_0000003"]
    lesion, globules = (split.mask(i, name, 256) for name in ("lesion_mask", "attribute_globules_mask"))
    assert lesion is not None
    assert np.array_equal(lesion, globules)
    assert split.mask(i, "attribute_milia_like_cyst_mask", 256) is None


def test_boxes_are_fractions_where_the_opacity_shows(prepared: Path) -> None:
    split, i = everything(prepared, "radiology")["nih_00000002_001"]
    (box,) = boxes(split.records[i])
    assert box == {"label": "infiltrate", "x": 8 / 64, "y": 16 / 64, "w": 12 / 64, "h": 24 / 64}
    bright = split.image(i, 256)[..., 0] > 128
    inside = np.zeros_like(bright)
    inside[64:160, 32:80] = True
    assert (bright & inside).sum() / (bright | inside).sum() > 0.97


def test_left_stays_left_and_the_whole_radiograph_is_kept(prepared: Path) -> None:
    split, i = everything(prepared, "radiology")["kermany_person2_bacteria_12"]
    columns = split.image(i, 256)[..., 0].mean(axis=0)
    assert (columns[:80] > 200).all()
    assert (columns[90:] < 60).all()


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_an_orientation_tag_turns_no_picture(tmp_path: Path, orientation: int) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    path = tmp_path / "person1_bacteria_1.jpeg"
    publishers.picture((40, 60), (0, 0, 20, 40), colour=False).save(path, exif=tag)
    row = shards.encode(Original({"image_id": "a", "findings": []}, path), "radiology", "stretch")
    path.write_bytes(row["image"]["bytes"])
    columns = np.asarray(Image.open(path)).mean(axis=0)
    assert columns[:80].min() > 200 > 60 > columns[90:].max()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["crop", "pad", "stretch"]), st.integers(40, 90), st.integers(40, 90))
def test_box_and_picture_go_through_the_same_window(draw: st.DataObject, fit: Any, width: int, height: int) -> None:
    left, top = draw.draw(st.integers(0, width - 8)), draw.draw(st.integers(0, height - 8))
    w, h = draw.draw(st.integers(8, width - left)), draw.draw(st.integers(8, height - top))
    frame = Frame(width, height, fit)
    inside = np.zeros((height, width), np.uint8)
    inside[top : top + h, left : left + w] = 255
    box = frame.box({"label": "x", "x": left / width, "y": top / height, "w": w / width, "h": h / height})
    rows, columns = np.nonzero(frame.square(inside, 360) >= 128)
    if box is None:
        assert fit == "crop"
        assert rows.size == 0
        return
    assert box["x"] >= 0
    assert box["y"] >= 0
    assert box["x"] + box["w"] <= 1.0001
    assert box["y"] + box["h"] <= 1.0001
    if rows.size:
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        expected = [360 * v for v in (box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"])]
        assert np.allclose(found, expected, atol=360 / min(width, height) * 0.75 + 1)


def test_padding_keeps_proportions_with_black_bars() -> None:
    square = Frame(60, 40, "pad").square(np.full((40, 60), 200, np.uint8), 120)
    assert (square[22:98] == 200).all()
    assert (square[:18] == 0).all()
    assert (square[102:] == 0).all()


def test_a_box_outside_the_crop_is_left_out() -> None:
    assert Frame(200, 100, "crop").box({"label": "x", "x": 0.0, "y": 0.0, "w": 0.2, "h": 1.0}) is None


def changed(originals: Folders, name: str, tmp_path: Path, change: Callable[[Path], object]) -> Folders:
    copy = tmp_path / name
    shutil.copytree(originals[name], copy)
    change(copy)
    return {**originals, name: copy}


def without_column(file: str, column: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(path.read_text().replace(column, "renamed", 1))

    return change


ONE_IMAGE = "HAM10000_images_part_2/ISIC_0024306.jpg"
LESION_MASK = "ISIC2018_Task1_Training_GroundTruth/ISIC_0000002_segmentation.png"
STREAKS = "ISIC2018_Task2_Training_GroundTruth_v3/ISIC_0000002_attribute_streaks.png"
RADIOGRAPH = "images_002/images/00000003_000.png"
CHILD = "chest_xray/train/PNEUMONIA/person3_bacteria_13.jpeg"


@pytest.mark.parametrize(
    ("domain", "name", "change", "expected"),
    [
        ("dermatology", "ham10000", lambda f: (f / "HAM10000_metadata.csv").unlink(), r"no HAM10000_metadata.csv or "),
        (
            "dermatology",
            "ham10000",
            without_column("HAM10000_metadata.csv", "dx_type"),
            r"lacks the columns \['dx_type'\]",
        ),
        (
            "dermatology",
            "ham10000",
            lambda f: (f / ONE_IMAGE).unlink(),
            r"1 of 32 images lack a file.*ISIC_0024306.jpg",
        ),
        (
            "dermatology",
            "ham10000",
            lambda f: (f / ONE_IMAGE).write_bytes(b"no"),
            r"ISIC_0024306.jpg cannot be decoded",
        ),
        (
            "dermatology",
            "ham10000",
            lambda f: shutil.rmtree(f / "HAM10000_segmentations_lesion_tschandl"),
            r"no HAM10000_segmentations_lesion_tschandl.*lesion masks of HAM10000",
        ),
        ("dermatology", "isic2018", lambda f: (f / STREAKS).unlink(), r"ISIC_0000002_attribute_streaks.png"),
        (
            "dermatology",
            "isic2018",
            lambda f: publishers.mask((80, 120)).save(f / LESION_MASK),
            r"ISIC_0000002_segmentation.png is 120 x 80 pixels, its image .* 120 x 90",
        ),
        (
            "radiology",
            "nih",
            lambda f: (f / "BBox_List_2017.csv").unlink(),
            r"no BBox_List_2017.csv in .*the boxes of NIH",
        ),
        ("radiology", "nih", without_column("Data_Entry_2017.csv", "View Position"), r"lacks .*'View Position'"),
        (
            "radiology",
            "nih",
            without_column("Data_Entry_2017.csv", "Patient Gender"),
            r"lacks the column Patient Gender",
        ),
        ("radiology", "nih", without_column("BBox_List_2017.csv", "Finding Label"), r"must begin with Image Index"),
        ("radiology", "nih", lambda f: (f / RADIOGRAPH).unlink(), r"1 of 22 images lack a file.*00000003_000.png"),
        ("radiology", "kermany", lambda f: shutil.rmtree(f / "chest_xray/test/NORMAL"), r"no test/NORMAL"),
        ("radiology", "kermany", lambda f: shutil.rmtree(f / "chest_xray"), r"no train/ in .*chest_xray"),
        (
            "radiology",
            "kermany",
            lambda f: (f / CHILD).rename(f / "chest_xray/train/NORMAL/person3_bacteria_13.jpeg"),
            r"NORMAL/person3_bacteria_13.jpeg has no name of an image in NORMAL/",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    originals: Folders, tmp_path: Path, domain: str, name: str, change: Callable[[Path], object], expected: str
) -> None:
    folders = changed(originals, name, tmp_path, change)
    with pytest.raises(InputError, match=expected):
        run(config(domain, folders, tmp_path / "out"))
    assert not (tmp_path / "out" / domain).exists(), "nothing that looks finished is left"


def test_images_that_lack_a_file_can_be_left_out(originals: Folders, tmp_path: Path) -> None:
    folders = changed(originals, "ham10000", tmp_path, lambda f: (f / ONE_IMAGE).unlink())
    run(config("dermatology", folders, tmp_path / "out", allow_missing=True))
    assert set(everything(tmp_path / "out", "dermatology")) == {
        f"ISIC_{i:07d}" for i in [*range(4), *range(24307, 24338)]
    }


def test_the_same_folders_give_the_same_shards(originals: Folders, prepared: Path, tmp_path: Path) -> None:
    run(config("radiology", originals, tmp_path))
    names = sorted(path.name for path in (tmp_path / "radiology").iterdir())
    assert names == sorted(path.name for path in (prepared / "radiology").iterdir())
    for name in names:
        assert (tmp_path / "radiology" / name).read_bytes() == (prepared / "radiology" / name).read_bytes()


def test_another_publisher_beside_it_moves_no_group(originals: Folders, prepared: Path, tmp_path: Path) -> None:
    run(PrepareConfig(domain="dermatology", out=tmp_path, ham10000=originals["ham10000"]))
    both = everything(prepared, "dermatology")
    for image_id, (split, _) in everything(tmp_path, "dermatology").items():
        assert split.name == both[image_id][0].name


def test_shards_are_bounded_and_read_as_one(
    originals: Folders, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 5)
    counts = run(config("radiology", originals, tmp_path, shard_mb=0.02))
    paths = sorted((tmp_path / "radiology").glob("train-*.parquet"))
    assert len(paths) > 2
    assert [path.name for path in paths] == [f"train-{i:05d}-of-{len(paths):05d}.parquet" for i in range(len(paths))]
    assert {path.name for path in paths} <= set(counts["shards"])
    whole, parts = (open_split("radiology", "train", out) for out in (prepared, tmp_path))
    assert whole.records == parts.records


def test_counts_are_written_beside_the_shards(prepared: Path) -> None:
    counts = json.loads((prepared / "radiology" / "metrics.json").read_text())
    for split in SPLITS:
        opened = open_split("radiology", split, prepared)
        assert sum(counts["images"][split].values()) == len(opened)
        assert counts["groups"][split] == len(set(opened.groups))
    assert (counts["fit"], counts["side_px"], counts["jpeg_quality"]) == ("stretch", 256, 95)


def test_shards_that_are_there_are_not_overwritten(originals: Folders, prepared: Path) -> None:
    with pytest.raises(InputError, match="radiology is there already"):
        run(config("radiology", originals, prepared))


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(
    originals: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))

    def interrupted(*arguments: Any, **options: Any) -> dict[str, Any]:
        if next(calls) == 30:
            raise KeyboardInterrupt
        return encode(*arguments, **options)

    encode = shards.encode
    with monkeypatch.context() as patch:
        patch.setattr(shards, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config("radiology", originals, tmp_path))
    with pytest.raises(InputError, match="no train"):
        open_split("radiology", "train", tmp_path)
    run(config("radiology", originals, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["radiology"]


def test_a_limit_takes_whole_groups_and_grows_with_the_number() -> None:
    many = [Original({"image_id": str(i), "lesion_id": f"L{i // 3}"}, Path("x")) for i in range(300)]
    few, more = ({o.row["image_id"] for o in limited(many, most)} for most in (40, 90))
    assert len(few) in (38, 39, 40)
    assert len(more) == 90
    assert few < more
    assert all(sum(o.row["lesion_id"] == f"L{i}" for o in limited(many, 40)) in (0, 3) for i in range(100))


@pytest.mark.parametrize(
    ("text", "years"),
    [("45", 45.0), ("45.0", 45.0), ("058Y", 58.0), ("006M", 0.5), ("", None), ("unknown", None), ("411", None)],
)
def test_ages_as_published(text: str, years: float | None) -> None:
    assert age_years(text) == years


def test_an_age_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="'old' is no age"):
        age_years("old")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_in_each_dialect(tmp_path: Path, delimiter: str) -> None:
    path = publishers.table(tmp_path / "t.csv", ["a", "b b"], [["1", f"x{delimiter}y"], ["2", " z "]], delimiter)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_table(path, ["a", "b b"]) == [{"a": "1", "b b": f"x{delimiter}y"}, {"a": "2", "b b": "z"}]


def test_a_row_that_ends_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(InputError, match=r"t.csv, line 3: the row ends before"):
        read_table(tmp_path / "t.csv", ["a", "b"])


def test_a_box_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text('Image Index,Finding Label,"Bbox [x",y,w,h],,,\na.png,Mass,1,2,3,wide,,,\n')
    with pytest.raises(InputError, match=r"line 2: x, y, w and h must be numbers"):
        nih_chestxray14.read_boxes(path)


def test_the_command_prepares_and_reports_what_is_wrong(
    originals: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--domain", "radiology", "--out", str(tmp_path), "--kermany", str(originals["kermany"])]
    assert main(arguments) == 0
    assert len(open_split("radiology", "train", tmp_path)) > 20
    assert main(["prepare", "--domain", "dermatology", "--nih", str(originals["nih"])]) == 1
    assert "prepare: --nih does not belong to dermatology" in capsys.readouterr().err
    assert main(["prepare", "--domain", "dermatology"]) == 1
    assert "dermatology reads --ham10000 and --isic2018" in capsys.readouterr().err
    assert main(["prepare", "--domain", "radiology", "--nih", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 1
    assert "--nih: no folder" in capsys.readouterr().err
