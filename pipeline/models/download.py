"""A registered model's files on this machine.

They are copied byte for byte with their manifest, so the folder is a model for every command, by the
same hashes; it is there as a whole or not at all, and nobody else may read it.
"""

from pathlib import Path

from pipeline.models.export import hand_out
from pipeline.models.registry import load


def download(ref: str, folder: Path, tracking_uri: str) -> Path:
    """Copies the model `ref` to `folder`, which must be new or empty, with the rights 0700.

    Raises RegistryError if there is no such model or it is not what was registered, TakenError if
    the folder is taken or cannot be written.
    """
    loaded = load(ref, tracking_uri)
    hand_out(loaded, str(folder))
    folder.chmod(0o700)
    return folder
