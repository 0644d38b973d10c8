"""`python -m train prepare`: parquet shards from the folders in which the publishers distribute their images.

Pictures become 256 x 256 JPEG of quality 95. Dermoscopic images keep their central square, which the lesion is framed
for. Radiographs are stretched to a square by default: nothing at the edge of a lung is lost, fractions of boxes and the
ratio of two widths stay what they were, and the shipped models were trained on Kermany images treated so; `--fit pad`
keeps their proportions. No picture is turned or mirrored, so that the patient's right stays on the image's left.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

from medviz.errors import InputError
from train.datasets import ham10000, isic2018, jsrt, kermany, nih_chestxray14, nlm, shards
from train.datasets.originals import SIDE_PX, Fit, Original
from train.datasets.split import SPLITS, images_root

logger = logging.getLogger(__name__)

DEFAULT_FIT: dict[str, Fit] = {"dermatology": "crop", "radiology": "stretch"}
PUBLISHERS = {
    "dermatology": ("ham10000", "isic2018"),
    "radiology": ("nih", "kermany", "montgomery", "shenzhen", "jsrt"),
}
TABLES = ("isic2019_metadata", "isic2019_labels", "artefacts_manual", "artefacts_rl4med")


@dataclass
class PrepareConfig:
    """Build the training shards of one domain from the publishers' folders."""

    domain: Literal["dermatology", "radiology"]
    out: Path | None = None
    """Folder for DOMAIN/SPLIT-*.parquet; the one that MEDVIZ_DATA names, or data, if not given."""
    ham10000: Path | None = None
    """Folder with HAM10000_metadata, the images and HAM10000_segmentations_lesion_tschandl."""
    isic2018: Path | None = None
    """Folder with ISIC2018_Task1-2_Training_Input and the ground truth folders of tasks 1 and 2."""
    isic2019_metadata: Path | None = None
    """ISIC_2019_Training_Metadata.csv: lesion, age, sex and site of the ISIC 2018 images."""
    isic2019_labels: Path | None = None
    """ISIC_2019_Training_GroundTruth.csv: diagnosis of the ISIC 2018 images."""
    artefacts_manual: Path | None = None
    """isic_bias.csv of Bissoto et al. 2020: artefacts labelled by hand. Without a table they are null."""
    artefacts_rl4med: Path | None = None
    """isic2019_all.csv of Saremi et al. 2025: artefacts of further images; labels by hand win."""
    nih: Path | None = None
    """Folder with Data_Entry_2017*.csv, BBox_List_2017.csv and images*/."""
    kermany: Path | None = None
    """Folder chest_xray, or the one that holds it."""
    montgomery: Path | None = None
    """Folder MontgomerySet, or the one that holds it."""
    shenzhen: Path | None = None
    """Folder ChinaSet_AllFiles, or the one that holds it."""
    jsrt: Path | None = None
    """Folder with CLNDAT_EN.txt, CNNDAT_EN.TXT and the images *.IMG."""
    fit: Fit | None = None
    """How a picture becomes a square: crop (default for dermatology), stretch (default for radiology) or pad."""
    max_images: int = 0
    """Most images of each source, in whole lesions or patients chosen by a hash (0: all)."""
    allow_missing: bool = False
    """Leave out images that lack a file, instead of stopping."""
    shard_mb: float = 64.0
    """Size in MiB at which the next shard begins."""
    workers: int = 4
    """Threads that decode and encode pictures."""


def check(config: PrepareConfig) -> None:
    """Raise InputError for folders of the other domain, no folder, paths that do not exist, or figures out of range."""
    mine = PUBLISHERS[config.domain] + (TABLES if config.domain == "dermatology" else ())
    others = [name for names in (*PUBLISHERS.values(), TABLES) for name in names if name not in mine]
    wrong = [f"--{name.replace('_', '-')}" for name in others if getattr(config, name) is not None]
    if wrong:
        raise InputError(f"{', '.join(wrong)} does not belong to {config.domain}")
    if all(getattr(config, name) is None for name in PUBLISHERS[config.domain]):
        raise InputError(f"no folder given: {config.domain} reads --{' and --'.join(PUBLISHERS[config.domain])}")
    for name in mine:
        path = getattr(config, name)
        if path is not None and not (path.is_file() if name in TABLES else path.is_dir()):
            raise InputError(f"--{name.replace('_', '-')}: no {'file' if name in TABLES else 'folder'} {path}")
    if config.max_images < 0 or config.shard_mb <= 0 or config.workers < 1:
        raise InputError("--max-images must be 0 or more, --shard-mb above 0 and --workers 1 or more")


def read_originals(config: PrepareConfig) -> list[Original]:
    """The images of all folders given, each image_id once, at most `max_images` of a source, in a mixed order."""
    allow = config.allow_missing
    sources: list[list[Original]] = []
    if config.ham10000 is not None:
        sources.append(ham10000.read_originals(config.ham10000, allow))
    if config.isic2018 is not None:
        known_of = isic2018.read_isic2019(config.isic2019_metadata, config.isic2019_labels)
        sources.append(isic2018.read_originals(config.isic2018, known_of, allow))
    if config.nih is not None:
        sources.append(nih_chestxray14.read_originals(config.nih, allow))
    if config.kermany is not None:
        sources.append(kermany.read_originals(config.kermany, allow))
    if config.montgomery is not None:
        sources.append(nlm.read_montgomery(config.montgomery, allow))
    if config.shenzhen is not None:
        sources.append(nlm.read_shenzhen(config.shenzhen, allow))
    if config.jsrt is not None:
        sources.append(jsrt.read_originals(config.jsrt, allow))
    chosen: dict[str, Original] = {}
    for source in sources:
        for original in limited(source, config.max_images):
            image_id = original.row["image_id"]
            if image_id in chosen:
                logger.warning("%s is there twice: %s is left out", image_id, original.image)
            chosen.setdefault(image_id, original)
    labels: dict[str, dict[str, Any]] = {}
    if config.artefacts_rl4med is not None:
        labels |= isic2018.read_artefacts(config.artefacts_rl4med, "rl4med")
    if config.artefacts_manual is not None:
        labels |= isic2018.read_artefacts(config.artefacts_manual, "manual")
    labelled = [replace(o, row={**o.row, **labels.get(name, {})}) for name, o in chosen.items()]
    return sorted(labelled, key=lambda o: shards.shuffle_key(o.row["image_id"]))


def limited(originals: Sequence[Original], most: int) -> list[Original]:
    """At most `most` images (0: all), in whole groups; the choice among groups is a hash's and grows with `most`."""
    if most == 0 or len(originals) <= most:
        return list(originals)
    sizes = Counter(original.group for original in originals)
    groups, count = set(), 0
    for group in sorted(sizes, key=shards.shuffle_key):
        if count + sizes[group] > most:
            break
        groups.add(group)
        count += sizes[group]
    return [original for original in originals if original.group in groups]


def run(config: PrepareConfig) -> dict[str, Any]:
    """Write DOMAIN/SPLIT-*.parquet and metrics.json below the folder chosen; returns the counts.

    All files are written to a folder beside their place and renamed with it, so that an interrupted run leaves nothing
    that looks finished. Raises InputError for wrong options or originals, and where the domain has shards already.
    """
    check(config)
    root = images_root(config.out)
    place, writing = root / config.domain, root / f".writing-{config.domain}"
    if place.exists():
        raise InputError(f"{place} is there already: remove it, or choose another --out")
    originals = read_originals(config)
    if not originals:
        raise InputError("the folders hold no images")
    fit = config.fit or DEFAULT_FIT[config.domain]
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    names: list[str] = []
    by_split = {split: [o for o in originals if shards.split_of(o.group) == split] for split in SPLITS}
    encode = partial(shards.encode, domain=config.domain, fit=fit)
    size_bytes = int(config.shard_mb * 2**20)
    bar = tqdm(total=len(originals), unit="image", dynamic_ncols=True)
    with ThreadPoolExecutor(config.workers) as pool, bar:

        def parts(chosen: Sequence[Original]) -> Iterator[list[dict[str, Any]]]:
            for start in range(0, len(chosen), shards.ROWS_PER_GROUP):
                rows = list(pool.map(encode, chosen[start : start + shards.ROWS_PER_GROUP]))
                bar.update(len(rows))
                yield rows

        for split, chosen in by_split.items():
            if not chosen:
                logger.warning("no lesion or patient fell to %s: too few images", split)
            written = shards.write_split(writing, split, parts(chosen), shards.FEATURES[config.domain], size_bytes)
            names += [path.name for path in written]
    counts = {
        "domain": config.domain,
        "images": {split: dict(Counter(o.row["source"] for o in chosen)) for split, chosen in by_split.items()},
        "groups": {split: len({o.group for o in chosen}) for split, chosen in by_split.items()},
        "fit": fit,
        "side_px": SIDE_PX,
        "jpeg_quality": shards.JPEG_QUALITY,
        "shards": names,
    }
    (writing / "metrics.json").write_text(json.dumps(counts, indent=1))
    writing.replace(place)
    logger.info("%d images in %s", len(originals), place)
    return counts


def main(arguments: list[str]) -> None:
    """`python -m train prepare --domain dermatology --ham10000 FOLDER --isic2018 FOLDER --out FOLDER`."""
    run(tyro.cli(PrepareConfig, args=arguments, prog="python -m train prepare"))
