"""The weights of Inception that a user names, by path or URL, brought into the store once.

safetensors, or what `torch.save(state_dict)` wrote, such as pytorch-fid's
pt_inception-2015-12-05-6726825d.pth (the last digits of the name are the first of its SHA-256). A `.pth` is a
pickle: it is opened in the confined process that opens everybody's checkpoints, here and not by
every worker. Workers read the safetensors file in the store, whose hash they are told.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pipeline import storage
from pipeline.artifacts import MANIFEST, Manifest, tensors_from_bytes
from pipeline.models.inception import InceptionError, inception_manifest, with_weights, write_inception
from pipeline.untrusted.published import receive

MOST_BYTES = 1 << 30


def keep(source: str, sha256: str | None, folder: str) -> Manifest:
    """Puts the weights in the file at a path or URL below `folder`, if they are not there; where they are.

    The manifest's field `source_sha256` is the file's hash. Raises InceptionError if that does
    not begin with `sha256`, or what is in the file does not fit; UntrustedError if it cannot be opened,
    StoreError if it cannot be had.
    """
    data, found = _fetched(source, sha256)
    url = storage.join(folder, found[:16])
    if not storage.exists(storage.join(url, MANIFEST)):
        write_inception(url, with_weights(_weights(data, source), source), found)
    return inception_manifest(url)


def _fetched(source: str, sha256: str | None) -> tuple[bytes, str]:
    url = storage.normalize(source)
    size = storage.size(url)
    if size > MOST_BYTES:
        raise InceptionError(f"{source}: has {size:,} bytes; Inception's weights have a tenth of 1 GB.")
    data = storage.read_bytes(url)
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not found.startswith(sha256.lower()):
        raise InceptionError(
            f"{source}: its SHA-256 is {found}, not {sha256}: it is another file, or was changed."
        )
    return data, found


def _weights(data: bytes, source: str) -> Mapping[str, Tensor]:
    if data[8:9] == b"{":
        return tensors_from_bytes(data, source)
    with tempfile.NamedTemporaryFile(prefix="nvae-inception-") as file:
        file.write(data)
        file.flush()
        return receive(Path(file.name), "weights", source).weights
