"""Trials of where: side and zone of opacities on boxed films, and the cardiothoracic ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medviz.domains.lung_places import SIDES, box_locations
from medviz.evidence.chest import cardiothoracic_ratio, zone_shares
from train.datasets.evidence import radiology
from train.datasets.split import Split
from train.evaluate.audit.instruments import Instrument, Row, gate, unseen_rows
from train.evaluate.statistics import median_interval, share_interval


def place_rows(instrument: Instrument, splits: Sequence[Split], size_px: int) -> list[Row]:
    """Side and zone of the opacity on real films that readers boxed on one side."""
    if instrument.detector is None or instrument.head_of("opacity") is None:
        return []
    sides, zones = [], []
    for split in splits:
        for index in unseen_rows(split, instrument.half):
            record = split.records[index]
            marked = [box for box in radiology.finding_boxes(record) if box["label"] == radiology.READERS_BOX]
            named = {place for box in marked for place in box_locations(box)}
            if len({place.split()[0] for place in named}) != 1:
                continue
            answers = {each.name: each for each in instrument.detector([split.image(index, size_px)])[0]}
            lungs = [answers[f"{side}_lung"].mask >= 0.5 for side in SIDES]
            opacity = answers["opacity"].mask
            shares = zone_shares(np.where(opacity >= 0.5 * opacity.max(), opacity, 0), *lungs)
            most = max(shares, key=lambda zone: shares[zone])
            by_side = {side: sum(share for zone, share in shares.items() if zone.startswith(side)) for side in SIDES}
            sides.append(max(by_side, key=lambda side: by_side[side]) == next(iter(named)).split()[0])
            if not any(place.endswith("lung") for place in named):
                zones.append(most in named)
    return [
        Row(
            instrument.name,
            "opacity",
            trial,
            "boxed films",
            share_interval(np.array(hits, bool)),
            gate(trial, "opacity"),
        )
        for trial, hits in (("side", sides), ("zone", zones))
    ]


def ratio_rows(instrument: Instrument, splits: Sequence[Split], size_px: int, seed: int) -> list[Row]:
    """The cardiothoracic ratio of films whose heart and lungs were outlined by hand."""
    if instrument.detector is None or instrument.head_of("heart") is None:
        return []
    errors, missed = [], 0
    for split in splits:
        outlined = radiology.read_structures(split.name, size_px)
        for index in unseen_rows(split, instrument.half):
            truth = cardiothoracic_ratio(outlined.get(split.records[index]["image_id"], {}))
            if truth is None:
                continue
            answers = {each.name: each for each in instrument.detector([split.image(index, size_px)])[0]}
            found = answers["cardiomegaly"].measure
            missed += found is None
            errors.append(np.nan if found is None else abs(found - truth))
    estimate = median_interval(np.array(errors), seed=seed)
    return [
        Row(instrument.name, "heart", "ratio_error", "JSRT", estimate, gate("ratio_error", "heart"), {"missed": missed})
    ]
