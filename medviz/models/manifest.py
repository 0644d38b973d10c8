"""manifest.json of a model folder: what the models are, and the size and sha256 of every file they consist of."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medviz.errors import ModelError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,47}")  # domains and adapters: never a path
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
_COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")

# Formats that run code or hide objects when they are read, and weights in anything but safetensors.
FORBIDDEN_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".onnx", ".py"}
)
# May lie in the folder without being listed: nothing reads them.
_UNLISTED_SUFFIXES = frozenset({".md", ".png"})

_WAY_OUT = (
    "Restore the folder (`git restore`, or `git lfs pull` when its weights are stored there) "
    "or make it again with `python -m train`."
)


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and lower-case hexadecimal sha256 of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class HubSource:
    """A base pipeline on the Hugging Face Hub: one commit (40 hexadecimal digits, never a branch) and its files."""

    repo_id: str
    revision: str
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `files` maps POSIX paths relative to the folder to their records; `adapters` maps names to what
    adapter.json says; `grounding_adapter` is the one that phrases are looked for with (None: `default_adapter`);
    `few_step_adapter` the one that draws in as many steps as its adapter.json has timesteps (None: there is none);
    `spectra` holds what finished latents go through, see `medviz.generation.spectrum`; `tells` says what gives its
    pictures away, as seen by eye; `hub` is None when the pipeline lies in the folder itself. Figures that were not
    computed are None."""

    domain: str
    preset: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[Mapping[str, Any]] = ()
    training_cost: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    default_adapter: str | None = None
    grounding_adapter: str | None = None
    few_step_adapter: str | None = None
    spectra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tells: Sequence[str] = ()
    hub: HubSource | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def selectable(self) -> tuple[str, ...]:
        """The adapters that a request may name: all but the few-step one, which a number of steps asks for."""
        return tuple(name for name in self.adapters if name != self.few_step_adapter)

    @property
    def few_steps(self) -> int | None:
        """In how many steps the few-step adapter draws; None without one."""
        return None if self.few_step_adapter is None else len(self.adapters[self.few_step_adapter]["timesteps"])

    @property
    def sha256(self) -> str:
        """One sha256 over the names and hashes of all files, those on the Hub included: the identity of the models."""
        records = [*self.files.items(), *(self.hub.files.items() if self.hub else ())]
        lines = sorted(f"{record.sha256}  {name}\n" for name, record in records)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


_FIELDS = frozenset(Manifest.__dataclass_fields__) - {"files", "format_version"}


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> Manifest:
    """Hash every file of a finished model folder and write its manifest.json atomically.

    fields: the fields of Manifest but `files` and `format_version`; `adapters`, when absent, is read from
    adapters/NAME/adapter.json. Raises ModelError for an unknown field, a file in a forbidden format, a shard that an
    index names and the folder lacks, or a default or grounding adapter that is not there.
    """
    folder = Path(folder)
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        raise ModelError(f"unknown manifest fields {', '.join(unknown)}; allowed: {', '.join(sorted(_FIELDS))}")
    _refuse_forbidden(folder)
    content = {"format_version": FORMAT_VERSION, "adapters": _read_adapters(folder), **fields}
    if isinstance(content.get("hub"), HubSource):
        content["hub"] = asdict(content["hub"])
    files = {name: asdict(hash_file(folder / name)) for name in _listable(folder)}
    manifest = _parse({**content, "files": files}, folder / MANIFEST_NAME)
    _check_shards(folder, manifest)
    try:
        text = json.dumps({**content, "files": files}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ModelError(f"the manifest of {folder} cannot be written as JSON: {error}") from error
    _write_atomically(folder / MANIFEST_NAME, text)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json; ModelError when it is missing, truncated, of another version or inconsistent."""
    path = Path(folder) / MANIFEST_NAME
    content = read_json(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: it holds no JSON object. {_WAY_OUT}")
    return _parse(content, path)


def verify(folder: Path, manifest: Manifest) -> None:
    """Check the size and sha256 of every listed file, and that the folder holds no other file a model could read.

    Raises ModelError that names the first file that is missing, damaged, unlisted or in a forbidden format.
    """
    folder = Path(folder)
    _refuse_forbidden(folder)
    verify_files(folder, manifest.files)
    unlisted = sorted(set(_listable(folder)) - set(manifest.files))
    if unlisted:
        raise ModelError(f"{folder / unlisted[0]} is not listed in {MANIFEST_NAME}; remove it. {_WAY_OUT}")


def verify_files(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Check size and sha256 of the listed files of a folder; ModelError names the first one that differs."""
    for name, record in files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise ModelError(f"the model file {path} is missing. {_WAY_OUT}")
        found = hash_file(path) if path.stat().st_size == record.bytes else None
        if found is None:
            raise ModelError(
                f"the model file {path} is damaged: it has {path.stat().st_size} bytes instead of {record.bytes}. "
                f"{_WAY_OUT}"
            )
        if found.sha256 != record.sha256:
            raise ModelError(
                f"the model file {path} is damaged: its sha256 is {found.sha256} instead of {record.sha256}. {_WAY_OUT}"
            )


def hash_file(path: Path) -> FileRecord:
    """Return the size and sha256 of a file; ModelError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return FileRecord(sha256=digest, bytes=stream.tell())
    except OSError as error:
        raise ModelError(f"the model file {path} cannot be read: {error.strerror}. {_WAY_OUT}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of a model folder; ModelError, naming it, when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"the model file {path} is missing. {_WAY_OUT}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"the model file {path} is damaged: {error}. {_WAY_OUT}") from error


def _parse(content: Mapping[str, Any], path: Path) -> Manifest:
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(f"{path} has the format version {version!r}; this program reads version {FORMAT_VERSION}")
    unknown = sorted(set(content) - _FIELDS - {"files", "format_version"})
    if unknown or "files" not in content:
        raise ModelError(f"{path} is damaged: unknown {unknown} or no list of files. {_WAY_OUT}")
    try:
        values = {name: content[name] for name in _FIELDS & set(content) if name not in ("hub", "adapters")}
        manifest = Manifest(
            **values,
            adapters={str(name): dict(details) for name, details in dict(content.get("adapters", {})).items()},
            hub=_parse_hub(content.get("hub"), path),
            files=_parse_files(content["files"], path),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error!r}. {_WAY_OUT}") from error
    _check_names(manifest, path)
    _check_few_steps(manifest, path)
    return manifest


def _check_names(manifest: Manifest, path: Path) -> None:
    for name in (manifest.domain, *manifest.adapters):
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name) or name == "none":
            raise ModelError(
                f"{path}: {name!r} cannot be a domain's or adapter's name; allowed: {NAME_PATTERN.pattern}"
            )
    uses = {
        "default": manifest.default_adapter,
        "grounding": manifest.grounding_adapter,
        "few-step": manifest.few_step_adapter,
    }
    for use, chosen in uses.items():
        if chosen is not None and chosen not in manifest.adapters:
            raise ModelError(
                f"{path}: the {use} adapter {chosen!r} is not among the adapters "
                f"({', '.join(manifest.adapters) or 'there are none'})"
            )


def _check_few_steps(manifest: Manifest, path: Path) -> None:
    if manifest.few_step_adapter is None:
        return
    if manifest.few_step_adapter in (manifest.default_adapter, manifest.grounding_adapter):
        raise ModelError(f"{path}: the few-step adapter {manifest.few_step_adapter!r} cannot be the default one, too")
    timesteps = manifest.adapters[manifest.few_step_adapter].get("timesteps")
    whole = isinstance(timesteps, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in timesteps)
    if not whole or not timesteps or min(timesteps) < 0 or timesteps != sorted(set(timesteps), reverse=True):
        raise ModelError(
            f"{path}: the few-step adapter {manifest.few_step_adapter!r} needs falling timesteps, found {timesteps!r}"
        )
    last = manifest.recipe.get("few_step_finish", 0)
    if isinstance(last, bool) or not isinstance(last, int) or not 0 <= last < len(timesteps):
        raise ModelError(f"{path}: few_step_finish must be from 0 to {len(timesteps) - 1} of its steps, found {last!r}")


def _parse_files(content: Any, path: Path) -> dict[str, FileRecord]:
    files = {}
    for name, record in dict(content).items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name:
            raise ModelError(f"{path} lists {name!r}, which is no path inside the model folder")
        if parts.suffix.lower() in FORBIDDEN_SUFFIXES:
            raise ModelError(f"{path} lists {name}; only safetensors weights are loaded, never {parts.suffix}")
        found = FileRecord(sha256=record["sha256"], bytes=record["bytes"])
        if not _SHA256_PATTERN.fullmatch(found.sha256) or isinstance(found.bytes, bool) or found.bytes < 0:
            raise ModelError(f"{path} has no usable sha256 and size for {name}. {_WAY_OUT}")
        files[name] = found
    return files


def _parse_hub(content: Any, path: Path) -> HubSource | None:
    if content is None:
        return None
    revision = content.get("revision")
    if not isinstance(revision, str) or not _COMMIT_PATTERN.fullmatch(revision):
        raise ModelError(
            f"{path}: a Hub model must be pinned to a commit of 40 hexadecimal digits, got the revision {revision!r}"
        )
    files = _parse_files(content.get("files", {}), path)
    if not files:
        raise ModelError(f"{path}: a Hub model must list the size and sha256 of the files to fetch, under hub.files")
    return HubSource(repo_id=str(content["repo_id"]), revision=revision, files=files)


def _listable(folder: Path) -> list[str]:
    """The files a manifest lists: all but itself, hidden ones, and kinds that nothing reads."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.suffix.lower() not in _UNLISTED_SUFFIXES:
            names.append(name.as_posix())
    return [name for name in names if name != MANIFEST_NAME]


def _refuse_forbidden(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"the model folder {folder} is missing. {_WAY_OUT}")
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in FORBIDDEN_SUFFIXES:
            raise ModelError(
                f"{path} is refused: only safetensors weights are loaded, never {path.suffix}; remove it. {_WAY_OUT}"
            )


def _check_shards(folder: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if name.endswith(".safetensors.index.json"):
            for shard in set(read_json(folder / name)["weight_map"].values()):
                if (PurePosixPath(name).parent / shard).as_posix() not in manifest.files:
                    raise ModelError(f"{folder / name} names the shard {shard}, which is missing beside it")


def _read_adapters(folder: Path) -> dict[str, Any]:
    return {path.parent.name: read_json(path) for path in sorted(folder.glob("adapters/*/adapter.json"))}


def _write_atomically(path: Path, text: str) -> None:
    # A dot file: should the machine stop here, the leftover is neither listed nor read.
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
