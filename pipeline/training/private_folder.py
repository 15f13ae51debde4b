"""Folders of one process on its machine's disk that do not outlive it, though it be killed."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = "lock"


class PrivateFolder:
    """A new folder that nobody but this user can enter; deleted by `leave`, or after its owner's death.

    The owner holds a lock on a file in it. That tells across containers and restarts whether he
    lives, where process numbers mislead.
    """

    def __init__(self, prefix: str) -> None:
        """Deletes the folders of this prefix whose owners were killed."""
        _sweep(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = (self.path / "new").open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Only now, so that nobody ever finds it free.
        (self.path / "new").rename(self.path / _LOCK)

    def leave(self, *, keep: bool) -> None:
        """Delete it, or keep it for the user, to be deleted by nobody else."""
        if keep:
            (self.path / _LOCK).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        try:
            # Of the folder or link itself: a link of somebody else's may lead to what is ours.
            if folder.lstat().st_uid == os.getuid():
                with (folder / _LOCK).open("rb+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # In use, or kept for the user, or gone meanwhile.
