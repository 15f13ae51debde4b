"""A directory of hashed files with its manifest written last: what a checkpoint and an
exported model both are.

A directory counts only once its manifest.json is there, and the manifest names every file
with its length and SHA-256, and itself has a checksum. So a writer that dies half way leaves
nothing that looks whole, and a reader never uses a byte that the manifest does not vouch for.
Tensors are safetensors: no pickle can be reached from here. Rejected: a checksum beside each
file (a mixed directory of two writers would pass), and memory-mapping the checked file (it
may change in between).
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialize_safetensors
from torch import Tensor

from pipeline import storage
from pipeline.errors import InputError

MANIFEST = "manifest.json"
CHECKSUM = "checksum"
"""Of the rest of the manifest."""
# A manifest is a configuration, some metrics and a few hashes; a safetensors header has about
# 150 bytes per tensor and NVAE's largest published model 5,000 tensors. Whatever is far above
# that is a mistake or an attack on our memory: a header takes up to twenty times its length.
MANIFEST_BYTES = 4 << 20
HEADER_BYTES = 8 << 20

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArtifactError(InputError):
    """A directory of hashed files that cannot be trusted or is not there."""


class NewerFormatError(ArtifactError):
    """A directory that is presumably whole, but was written by a later release."""


@dataclass(frozen=True)
class FileEntry:
    """What the manifest promises about one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of one directory, checked for form but not yet against the files."""

    url: str
    """The directory."""
    sha256: str
    """Hash of manifest.json itself; who knows it can trust every file."""
    files: Mapping[str, FileEntry]
    fields: Mapping[str, Any]
    """Everything else that was recorded."""


def write_directory(
    url: str,
    files: Iterable[tuple[str, bytes | memoryview]],
    *,
    format: str,
    version: int,
    fields: Mapping[str, Any],
) -> Manifest:
    """Writes the files one by one, then the manifest, which makes the directory count.

    `files` may be a generator, so that one serialized file at a time is in memory. `fields`
    must be JSON without NaN. Raises StoreError if the store refuses, ArtifactError rather than
    writing a manifest so long that reading would refuse it.
    """
    entries = {}
    for name, data in files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"{name!r} cannot be the name of a file in {url}")
        storage.write_bytes(storage.join(url, name), data)
        entries[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    record = {
        "format": format,
        "format_version": version,
        **fields,
        "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in entries.items()},
    }
    text = sealed(record)
    if len(text) > MANIFEST_BYTES:
        raise ArtifactError(
            f"{storage.shown(storage.join(url, MANIFEST))}: would be larger than {MANIFEST_BYTES >> 20} MiB "
            "and is not written, for nobody could read it."
        )
    storage.write_bytes(storage.join(url, MANIFEST), text)
    return _parse_manifest(url, text, {format: version})


def sealed(record: Mapping[str, Any]) -> bytes:
    """The text of a manifest that says `record`, with the checksum by which damage is noticed.

    It is taken of this very text without the checksum, which reading and writing JSON repeats.
    """
    plain = {name: value for name, value in record.items() if name != CHECKSUM}
    return json.dumps(plain | {CHECKSUM: _checksum(plain)}, indent=2, allow_nan=False).encode()


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def read_manifest(url: str, *, format: str, version: int) -> Manifest:
    """Reads the manifest of the directory `url`, of this format and at most this version.

    Raises ArtifactError if there is none or it is malformed, NewerFormatError if a later
    release wrote it, StoreError if the store refuses.
    """
    return read_manifest_of(url, {format: version})


def read_manifest_of(url: str, versions: Mapping[str, int]) -> Manifest:
    """Like `read_manifest`, of any of several formats: `versions` has the latest of each."""
    location = storage.join(url, MANIFEST)
    try:
        size = storage.size(location)
        if size > MANIFEST_BYTES:
            limit = f"{MANIFEST_BYTES >> 20} MiB"
            raise ArtifactError(
                f"{storage.shown(location)}: larger than {limit}; this was not written by us."
            )
        # It may be deleted at any moment, by the writer who keeps but the newest.
        text = storage.read_bytes(location)
    except storage.MissingError as error:
        raise ArtifactError(
            f"{storage.shown(url)}: there is no {MANIFEST}. It was never written to its end, or it was "
            "deleted, or the address is wrong."
        ) from error
    return _parse_manifest(url, text, versions)


def _parse_manifest(url: str, text: bytes, versions: Mapping[str, int]) -> Manifest:
    location = storage.shown(storage.join(url, MANIFEST))
    try:
        record = json.loads(text)
        found = record.pop(CHECKSUM, None) if isinstance(record, dict) else None
        expected = _checksum(record)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{location}: not valid JSON ({error}); it was cut short or replaced.") from error
    format = record.get("format") if isinstance(record, dict) else None
    if not isinstance(format, str) or format not in versions:
        raise ArtifactError(
            f"{location}: the format is {format!r}, not {' or '.join(versions)}; check the address."
        )
    if found != expected:
        raise ArtifactError(
            f"{location}: its checksum is not that of its content; the manifest was damaged or changed."
        )
    version = record.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{location}: format_version is {version!r}; this was not written by us.")
    if version > versions[format]:
        raise NewerFormatError(
            f"{location}: has version {version} of the format {format}, and this release reads up to "
            f"{versions[format]}; install the release that wrote it."
        )
    return Manifest(
        url=storage.normalize(url),
        sha256=hashlib.sha256(text).hexdigest(),
        files=_entries(location, record.get("files")),
        fields={key: value for key, value in record.items() if key != "files"},
    )


def _entries(location: str, files: Any) -> dict[str, FileEntry]:
    if not isinstance(files, dict):
        raise ArtifactError(f"{location}: `files` is missing; the manifest was not written by us.")
    entries = {}
    for name, entry in files.items():
        well_formed = (
            _FILE_NAME.fullmatch(name)
            and isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and entry["bytes"] >= 0
            and isinstance(entry.get("sha256"), str)
            and _SHA256.fullmatch(entry["sha256"])
        )
        if not well_formed:
            raise ArtifactError(
                f"{location}: the entry {name!r} of `files` is malformed; names are plain file names, "
                "with `bytes` and `sha256`. The manifest was not written by us."
            )
        entries[name] = FileEntry(entry["bytes"], entry["sha256"])
    return entries


def read_verified(manifest: Manifest, name: str) -> bytes:
    """The content of one file, which is exactly what the manifest vouches for.

    Raises ArtifactError if it is not listed, missing, or different from what was written.
    """
    location = storage.join(manifest.url, name)
    shown = storage.shown(location)
    entry = manifest.files.get(name)
    if entry is None:
        raise ArtifactError(
            f"{storage.shown(manifest.url)}: has no file {name}; it has {', '.join(sorted(manifest.files))}."
        )
    try:
        size = storage.size(location)
        if size != entry.bytes:
            raise ArtifactError(
                f"{shown}: has {size} bytes, the manifest says {entry.bytes}. The upload was cut short or "
                "the file was replaced; restore it or use another version."
            )
        data: bytes = storage.read_bytes(location)
    except storage.MissingError as error:
        raise ArtifactError(f"{shown}: the file is gone; restore it or use another version.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise ArtifactError(
            f"{shown}: SHA-256 is {found[:12]}, the manifest says {entry.sha256[:12]}. The file was "
            "damaged or replaced; restore it or use another version."
        )
    return data


def damaged_files(manifest: Manifest) -> list[str]:
    """Names of the files that are gone or have another length, without reading any."""

    def is_whole(name: str, entry: FileEntry) -> bool:
        location = storage.join(manifest.url, name)
        return storage.exists(location) and storage.size(location) == entry.bytes

    return [name for name, entry in manifest.files.items() if not is_whole(name, entry)]


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file. The same tensors give the same bytes: no metadata, names in order."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = serialize_safetensors(on_host)
    return data


def tensors_from_bytes(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, on the CPU.

    `source` names the file in messages. Raises ArtifactError if the data are anything else:
    a pickle, a zip, a header that is too long or that points outside the file.
    """
    header = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    if not 0 <= header <= min(HEADER_BYTES, len(data) - 8):
        raise ArtifactError(
            f"{source}: not a safetensors file (its header would be {header} bytes long). Pickled "
            "checkpoints are never opened here, since opening one can run code."
        )
    try:
        tensors: dict[str, Tensor] = parse_safetensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ArtifactError(f"{source}: not a valid safetensors file ({error}).") from error
    return tensors
