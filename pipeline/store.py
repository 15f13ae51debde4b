"""The store: the one place that holds everything this project writes.

STORE/data/NAME     sharded data sets
STORE/runs/NAME     runs: record, checkpoints, journal, pictures
STORE/models/NAME   weights of registered model versions

Where it lies is a flag (`--store`) or an environment variable (NVAE_STORE), never a
setting: a run's configuration stays the same wherever it runs.
"""

import os

from pipeline import storage

DEFAULT = "nvae-store"
"""A folder in the working directory: no server, no account."""


def locate(flag: str | None) -> str:
    """The store's URL: the flag, else NVAE_STORE, else the default folder."""
    return storage.normalize(flag or os.environ.get("NVAE_STORE") or DEFAULT)


def data_url(root: str, store: str) -> str:
    """The URL of a data set: `store:NAME` is the folder data/NAME of the store."""
    prefix, _, name = root.partition(":")
    if prefix == "store":
        return storage.join(store, "data", name)
    return storage.normalize(root)
