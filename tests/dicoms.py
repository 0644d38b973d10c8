"""DICOM files made on the spot: an X-ray's header, filled with a name that must never come out again."""

import io

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

SECRET = "DOE^JANE"
ROWS, COLUMNS = 40, 48


def ramp(bits: int = 12, rows: int = ROWS, columns: int = COLUMNS, lowest: int = 0) -> np.ndarray:
    """Stored values from `lowest` over the whole depth, brighter from row to row."""
    values = np.linspace(lowest, lowest + 2**bits - 1, rows * columns).reshape(rows, columns)
    return np.rint(values).astype(np.int16 if lowest < 0 else np.uint16)


def dicom(stored: np.ndarray | None = None, syntax: str = uid.ExplicitVRLittleEndian, **elements: object) -> bytes:
    """A file of one grey image of 12 bits; elements: by keyword, None leaves one out."""
    stored = ramp() if stored is None else stored
    dataset = Dataset()
    wide = stored.dtype.itemsize == 2
    whole: dict[str, object] = {
        "SOPClassUID": uid.DigitalXRayImageStorageForPresentation,
        "SOPInstanceUID": "1.2.3",
        "PatientName": SECRET,
        "PatientID": SECRET,
        "InstitutionName": SECRET,
        "Modality": "DX",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": 16 if wide else 8,
        "BitsStored": 12 if wide else 8,
        "PixelRepresentation": int(np.issubdtype(stored.dtype, np.signedinteger)),
        "PixelData": stored.astype(stored.dtype.newbyteorder("<")).tobytes(),
        **elements,
    }
    whole.setdefault("HighBit", int(whole["BitsStored"] or 1) - 1)  # type: ignore[call-overload]
    for keyword, value in whole.items():
        if value is not None:
            setattr(dataset, keyword, value)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = whole["SOPClassUID"], "1.2.3"
    meta.TransferSyntaxUID = uid.UID(syntax)
    dataset.file_meta = meta
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW" if wide else "OB"
        dataset["PixelData"].is_undefined_length = (
            uid.UID(syntax).is_compressed and syntax != uid.DeflatedExplicitVRLittleEndian
        )
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(image: Image.Image, form: str, syntax: str, **elements: object) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95} if form == "JPEG" else {"no_jp2": True, "irreversible": False}
    image.save(buffer, form, **options)
    stored = np.asarray(image)
    return dicom(stored, syntax, **{"PixelData": encapsulate([buffer.getvalue()]), **elements})


def lookup_table(keyword: str, entries: np.ndarray, bits: int, first: int = 0, **described: int) -> dict[str, object]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [described.get("count", len(entries)), first, bits])
    item.add_new("LUTData", "US", [int(entry) for entry in entries])
    if keyword == "ModalityLUTSequence":
        item.ModalityLUTType = "US"
    return {keyword: [item]}
