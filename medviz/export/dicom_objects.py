"""A pair as DICOM objects: images, attention maps, outlines and scores, each of which says that it is synthetic.

Secondary Capture images of conversion type SYN, Parametric Maps of the attention, Segmentations of the outlines and a
Structured Report of the scores (TID 1500). docs/dicom-conformance.md describes them. UIDs are derived from the content
and dates are fixed, so the same pair gives the same files.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import highdicom
import numpy as np
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.color import CIELabColor
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID

from medviz import __version__
from medviz.domains import get_domain
from medviz.export.archive import NOTICE, SIDES, Side, packed, provenance, shared_picture
from medviz.rendering import outline_colours, resized_map, resized_mask

if TYPE_CHECKING:
    from medviz.results import Pair, Role

PATIENT_NAME = "SYNTHETIC^MEDVIZ"
CODING_SCHEME = "99MEDVIZ"
FIXED_DATE, FIXED_TIME = "19800101", "000000"
"""Dates that the standard demands: no date of a person, and the same for the same pair."""
ROLES: dict[Role, str] = {"reward": "Training reward", "judge": "Held-out judge"}
_NAMESPACE = uuid.UUID("7d1bd9d2-3d4b-5a7c-9a0e-6d65647669a7")
_MANUFACTURER = "medviz"
_CLOCK = (
    "InstanceCreationDate",
    "InstanceCreationTime",
    "DateOfSecondaryCapture",
    "TimeOfSecondaryCapture",
    "ContributionDateTime",
)
_UTF_8 = "ISO_IR 192"


def dicom_files(pair: Pair) -> dict[str, bytes]:
    """Return the DICOM files of a pair by their names; objects that would be empty are left out."""
    return {name: _encoded(dataset) for name, dataset in dicom_objects(pair).items()}


def dicom_archive(pair: Pair) -> bytes:
    """Pack the DICOM files of a pair and the notice into a zip; the same pair gives the same bytes."""
    return packed({**dicom_files(pair), "NOTICE.txt": f"{NOTICE}\n".encode()})


def dicom_objects(pair: Pair) -> dict[str, Dataset]:
    """Return the DICOM objects of a pair by their files' names."""
    return dict(_Study(pair).objects())


class _Study:
    """The objects of one pair: one study of up to four series, images, maps, outlines and scores."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.domain = pair, get_domain(pair.domain)
        self.pictures = {side: shared_picture(pair, side) for side in SIDES}
        pixels = {side: hashlib.sha256(picture.tobytes()).hexdigest() for side, picture in self.pictures.items()}
        content = {
            "versions": [__version__, highdicom.__version__],
            "request": vars(pair.request),
            "models": dict(pair.models),
            "pixels": pixels,
        }
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.study_uid = self.uid("study")

    def uid(self, name: str, content: bytes = b"") -> UID:
        """A UID under 2.25 of what the study holds, a name in it, and the content of one object."""
        named = f"{self.digest}/{name}/{hashlib.sha256(content).hexdigest()}"
        return highdicom.UID.from_uuid(str(uuid.uuid5(_NAMESPACE, named)))

    def objects(self) -> Iterator[tuple[str, Dataset]]:
        """Names and objects, images first."""
        images = {side: self.image(side) for side in SIDES}
        makers: dict[str, Callable[[Side, Dataset], Dataset | None]] = {
            "attention": self.attention,
            "outlines": self.outlines,
        }
        yield from ((f"{side}.dcm", image) for side, image in images.items())
        for name, make in makers.items():
            for side, image in images.items():
                made = make(side, image)
                if made is not None:
                    yield f"{side}-{name}.dcm", made
        report = self.scores(images)
        if report is not None:
            yield "scores.dcm", report

    def image(self, side: Side) -> Dataset:
        """The image with its visible label as a Secondary Capture, grey where the domain is."""
        imaging = self.domain.imaging
        pixels = np.asarray(self.pictures[side].convert("L" if imaging.grey else "RGB"))
        image = highdicom.sc.SCImage(
            pixel_array=pixels,
            photometric_interpretation="MONOCHROME2" if imaging.grey else "RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=imaging.orientation or ("L", "F"),
            study_instance_uid=self.study_uid,
            patient_id=f"SYNTHETIC-{self.digest[:16]}",
            patient_name=PATIENT_NAME,
            study_id=self.digest[:16],
            study_date=FIXED_DATE,
            study_time=FIXED_TIME,
            manufacturer_model_name="medviz",
            software_versions=__version__,
            specific_character_set=_UTF_8,
            **self._series("images", 1, side, pixels.tobytes()),
        )
        if imaging.orientation is None:
            image.PatientOrientation = None
        self._name_body_part(image)
        image.ConversionType = "SYN"
        image.StudyDescription = _text(f"SYNTHETIC {self.domain.name}: {self.pair.prompt}")
        image.SeriesDescription = "SYNTHETIC images"
        image.PatientComments = "Not a person. " + NOTICE
        image.ImageComments = f"{NOTICE} {side}: {self.pair.prompt}"
        image.BurnedInAnnotation = "NO"  # asks whether pixels identify a patient; the label SYNTHETIC does not
        image.RecognizableVisualFeatures = "NO"
        return self._finished(image, side)

    def attention(self, side: Side, image: Dataset) -> Dataset | None:
        """The attention of every word as one Parametric Map in float32, a frame a word.

        The standard demands a frame of reference and a pixel size: the size is nominal, and the image itself has none.
        """
        words = self.pair.words
        if not words:
            return None
        size = (image.Columns, image.Rows)
        maps = np.stack([resized_map(getattr(self.pair.attention(word), side), size) for word in words], axis=-1)
        quantity = _private("ATTENTION", "Cross-attention of a word, scaled to the pair's maximum")
        mappings = [
            highdicom.pm.RealWorldValueMapping(
                lut_label=f"WORD{number}",
                lut_explanation=_text(word),
                unit=codes.UCUM.NoUnits,
                value_range=(0.0, 1.0),
                quantity_definition=quantity,
            )
            for number, word in enumerate(words, start=1)
        ]
        placed = copy.deepcopy(image)
        placed.FrameOfReferenceUID, placed.PositionReferenceIndicator = self.uid("frame"), None
        placed.ImagePositionPatient, placed.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
        placed.PixelSpacing, placed.SliceThickness = [1, 1], 1
        made = highdicom.pm.ParametricMap(
            source_images=[placed],
            pixel_array=np.ascontiguousarray(maps[None]),
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[[mapping] for mapping in mappings],
            voi_lut_transformations=[highdicom.VOILUTTransformation(window_center=0.5, window_width=1.0)],
            content_label="ATTENTION",
            content_description=f"Attention of {len(words)} words, {side} image",
            **self._device(),
            **self._series("attention", 2, side, maps.tobytes() + json.dumps(words).encode()),
        )
        made.SeriesDescription = "SYNTHETIC attention"
        self._name_body_part(made)
        return self._finished(made, side)

    def outlines(self, side: Side, image: Dataset) -> Dataset | None:
        """The regions of the image as one binary Segmentation, a segment a region."""
        size, found = (image.Columns, image.Rows), getattr(self.pair, side).outlines
        masks = {name: resized_mask(mask, size) for name, mask in found.items()}
        masks = {name: mask for name, mask in masks.items() if mask.any()}
        if not masks:
            return None
        regions = {region.name: region for region in self.domain.regions}
        colours = outline_colours(list(masks))
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name="medviz segmenter",
            family=codes.DCM.ArtificialIntelligence,
            version=str(self.pair.models.get("segmenter", ""))[:64] or "unknown",
        )
        segments = []
        for number, name in enumerate(masks, start=1):
            region = regions[name]
            category = codes.SCT.MorphologicallyAbnormalStructure if region.abnormal else codes.SCT.AnatomicalStructure
            segments.append(
                highdicom.seg.SegmentDescription(
                    segment_number=number,
                    segment_label=region.label,
                    segmented_property_category=category,
                    segmented_property_type=(
                        sr.CodedConcept(region.snomed, "SCT", region.label)
                        if region.snomed
                        else _private(_code_value(name), region.label)
                    ),
                    algorithm_type="AUTOMATIC",
                    algorithm_identification=algorithm,
                    display_color=CIELabColor.from_rgb(*bytes.fromhex(colours[name][1:])),
                )
            )
        pixels = np.stack(list(masks.values()), axis=-1)[None].astype(np.uint8)
        made = highdicom.seg.Segmentation(
            source_images=[image],
            pixel_array=pixels,
            segmentation_type="BINARY",
            segment_descriptions=segments,
            content_label="OUTLINES",
            content_description=f"Regions found on the {side} image",
            **self._device(),
            **self._series("outlines", 3, side, pixels.tobytes() + json.dumps(list(masks)).encode()),
        )
        made.SeriesDescription = "SYNTHETIC outlines"
        made.PatientOrientation = image.PatientOrientation
        return self._finished(made, side)

    def scores(self, images: dict[Side, Dataset]) -> Dataset | None:
        """The scores of both images as a Measurement Report (TID 1500), a group an image and role."""
        groups, said = [], []
        for side, image in images.items():
            for role, title in ROLES.items():
                values = [
                    (score.name, float(value))
                    for score in self.pair.scores
                    if score.role == role and (value := getattr(score, side)) is not None
                ]
                if not values:
                    continue
                said.append([side, role, values])
                method = _private(role.upper(), title)
                groups.append(
                    sr.MeasurementsAndQualitativeEvaluations(
                        tracking_identifier=sr.TrackingIdentifier(
                            uid=self.uid(f"tracking {side} {role}"), identifier=f"{side} image, {title.lower()}"
                        ),
                        measurements=[
                            sr.Measurement(
                                name=_private(_code_value(name), name),
                                value=value,
                                unit=codes.UCUM.NoUnits,
                                method=method,
                            )
                            for name, value in values
                        ],
                        source_images=[sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)],
                    )
                )
        if not groups:
            return None
        observer = sr.ObserverContext(
            observer_type=codes.DCM.Device,
            observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                uid=self.uid("device"), name="medviz", manufacturer_name=_MANUFACTURER, model_name="medviz"
            ),
        )
        report = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=observer),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
            referenced_images=list(images.values()),
        )
        made = sr.ComprehensiveSR(
            evidence=list(images.values()),
            content=report,
            is_complete=True,
            coding_schemes=[
                CodingSchemeIdentificationItem(
                    designator=CODING_SCHEME, name="medviz private codes", responsible_organization=_MANUFACTURER
                )
            ],
            **self._series("scores", 4, "baseline", json.dumps(said).encode()),
        )
        made.SeriesDescription = "SYNTHETIC scores"
        return self._finished(made, "aligned")

    def _series(self, name: str, number: int, side: Side, content: bytes) -> dict[str, Any]:
        """Where an object stands in the study, as highdicom's classes take it."""
        return {
            "series_instance_uid": self.uid(f"series {name}"),
            "series_number": number,
            "sop_instance_uid": self.uid(f"{name} {side}", content),
            "instance_number": 1 + SIDES.index(side),
            "manufacturer": _MANUFACTURER,
        }

    def _name_body_part(self, made: Dataset) -> None:
        part = self.domain.imaging.body_part
        if part:
            made.BodyPartExamined = part
        else:
            made.Laterality = None  # of an unknown part of the body the side is unknown, too

    def _device(self) -> dict[str, Any]:
        return {
            "manufacturer_model_name": "medviz",
            "software_versions": __version__,
            "device_serial_number": str(self.pair.models.get("unet", ""))[:64] or "unknown",
        }

    def _finished(self, made: Dataset, side: Side) -> Dataset:
        """Say that an object is synthetic and by what it was made, and take the clock and random UIDs out of it."""
        made.SyntheticData = "YES"
        text = "; ".join(f"{key} {value}" for key, value in provenance(self.pair, side).png_text().items())
        synthesis = highdicom.ContributingEquipment(
            manufacturer=_MANUFACTURER,
            purpose_of_reference=codes.DCM.SynthesizingEquipment,
            manufacturer_model_name="medviz",
            software_versions=__version__,
            contribution_description=_text(text, 1024),
        )
        # highdicom takes the maker of the source image for what acquired it, and nothing was acquired.
        made.ContributingEquipmentSequence = [synthesis, highdicom.ContributingEquipment.for_highdicom()]
        dimensions = self.uid(f"dimensions {made.SOPInstanceUID}")

        def fix(parent: Dataset, element: Any) -> None:
            if element.keyword in _CLOCK:
                del parent[element.tag]
            elif element.keyword == "ContentDate":
                element.value = FIXED_DATE
            elif element.keyword == "ContentTime":
                element.value = FIXED_TIME
            elif element.keyword == "DimensionOrganizationUID":
                element.value = dimensions

        made.walk(fix)
        return made


def _text(text: str, characters: int = 64) -> str:
    """Text as DICOM's value representations LO (64 characters) and ST (1024) take it: without a backslash."""
    return text.replace("\\", "/")[:characters]


def _private(value: str, meaning: str) -> sr.CodedConcept:
    return sr.CodedConcept(value, CODING_SCHEME, _text(meaning))


def _code_value(name: str) -> str:
    """A code of at most 16 characters for any name."""
    return hashlib.sha256(name.encode()).hexdigest()[:12].upper()


def _encoded(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
