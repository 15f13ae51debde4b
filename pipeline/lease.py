"""Who runs a run now: the lease that keeps two launches of one name apart.

Object stores have no lock that all of them honour: conditional writes are refused or ignored
by several. So each launch writes a claim of its own, RUN/leases/OWNER.json, and then looks for
others. Of two launches at the same moment at least one sees the other, and whoever sees a
living claim beside its own withdraws: both may, but never do both go on. Rejected: one shared
file that is written and read back, where the slower writer overtakes the reader.

A claim that nobody renews expires. One whose process is gone from this very machine counts for
nothing at once, so that a killed run can be started again immediately. Of one of another machine,
or of another container of this one, whose process may be alive or may have died a moment ago, a new
launch waits to see: renewed, it turns the launch away within seconds; not renewed, it expires. That
takes a few renewals' time even if it looks expired, for the other machine's clock may be behind.
So is one that cannot be read: whoever lives behind it writes it anew.
"""

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import storage
from pipeline.errors import InputError

LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
WATCHED_RENEWALS = 3
"""How many a claim that looks expired is given to show that it is not."""
LOOK_SECONDS = 1.0
ANCIENT_SECONDS = 3600.0
"""Age of a claim that is of the dead whatever its owner's clock."""

logger = logging.getLogger(__name__)


class LeaseError(InputError):
    """Somebody else runs this run."""


@dataclass(frozen=True)
class _Claim:
    owner: str
    host: str
    boot: str
    pid: int
    started: str
    """When the process was started, by its machine's clock; the number alone is used again."""
    renewed: float
    """Seconds since the epoch, by the owner's clock."""

    @property
    def is_of_this_machine(self) -> bool:
        return self.host == socket.gethostname() and self.boot == _boot_id() != ""

    def is_alive(self) -> bool:
        if self.is_of_this_machine:
            return _started(self.pid) == self.started != ""
        return time.time() - self.renewed < LEASE_SECONDS

    @property
    def is_doubtful(self) -> bool:
        """Whether only the next renewal can tell if its process is alive."""
        return not self.is_of_this_machine and time.time() - self.renewed < ANCIENT_SECONDS

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


@dataclass(frozen=True)
class _DamagedClaim:
    """A claim that cannot be read: somebody's, or nobody's."""

    owner: str
    url: str

    is_doubtful = True

    def is_alive(self) -> bool:
        return True

    def __str__(self) -> str:
        return (
            f"somebody whose claim {storage.shown(self.url)} cannot be read (delete that file if nobody does)"
        )


def holder(url: str) -> str | None:
    """`host, process N` of whoever runs the run in the folder `url` now; None if nobody does."""
    return next((str(claim) for claim in _claims(url) if claim.is_alive()), None)


@contextmanager
def held(url: str, say: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Hold the run's lease; raises LeaseError if somebody else does.

    Whether a claim of another machine is that of a living process is waited for, for at most
    LEASE_SECONDS, with a line to `say`.
    """
    dead = _await_the_dead(url, say)
    _refuse_another(url, dead)
    for claim in dead:
        storage.delete(_claim_url(url, claim.owner))
    owner = uuid.uuid4().hex
    _write(url, owner)
    done = threading.Event()
    renewal = threading.Thread(target=_renew, args=(url, owner, done), name="lease", daemon=True)
    try:
        _refuse_another(url, dead, owner)
        renewal.start()
        yield
    finally:
        done.set()
        if renewal.ident is not None:
            renewal.join()
        try:
            storage.delete(_claim_url(url, owner))
        except storage.StoreError as error:
            # What was done is done; a claim that nobody renews expires.
            logger.warning("the lease of %s could not be given back: %s", url, error)


def _await_the_dead(url: str, say: Callable[[str], None]) -> list[_Claim | _DamagedClaim]:
    """The claims that nobody lives behind, as they are now; whoever does changes his.

    Returns when a doubtful one was renewed, or none is left that may still be.
    """
    first = _claims(url)
    watched = {claim.owner: claim for claim in first if claim.is_doubtful}
    # By this machine's clock alone: that of another may be ahead, or behind.
    began = time.monotonic()
    for claim in watched.values():
        say(f"{url} was being run by {claim}; waiting to see whether it still is ...")
    while watched and (waited := time.monotonic() - began) < LEASE_SECONDS:
        expired = not any(claim.is_alive() for claim in watched.values())
        if expired and waited > WATCHED_RENEWALS * RENEW_SECONDS:
            break
        time.sleep(LOOK_SECONDS)
        found = {claim.owner: claim for claim in _claims(url)}
        watched = {owner: claim for owner, claim in watched.items() if owner in found}
        if any(found[owner] != claim for owner, claim in watched.items()):
            break
    return [claim for claim in first if claim.is_doubtful or not claim.is_alive()]


def _refuse_another(url: str, dead: Sequence[_Claim | _DamagedClaim], owner: str = "") -> None:
    for claim in _claims(url):
        if claim.owner != owner and claim not in dead:
            raise LeaseError(
                f"{url} is already being run by {claim}. Wait for it, stop it with `nvae runs stop`, "
                "or give the new run another --name."
            )


def _renew(url: str, owner: str, done: threading.Event) -> None:
    while not done.wait(RENEW_SECONDS):
        try:
            _write(url, owner)
        except storage.StoreError as error:
            # An outage of the store must not end the training; the next renewal may succeed.
            logger.warning("the lease of %s could not be renewed: %s", url, error)


def _claim_url(url: str, owner: str) -> str:
    return storage.join(url, "leases", f"{owner}.json")


def _claims(url: str) -> list[_Claim | _DamagedClaim]:
    """Every claim there is, of the living and the dead."""
    folder = storage.join(url, "leases")
    claims: list[_Claim | _DamagedClaim] = []
    for name in storage.list_dir(folder):
        claim_url = storage.join(folder, name)
        try:
            claims.append(_read(claim_url, name.removesuffix(".json")))
        except storage.MissingError:
            continue  # Given back since it was listed.
    return claims


def _read(claim_url: str, owner: str) -> _Claim | _DamagedClaim:
    content = storage.read_bytes(claim_url)
    try:
        claim = _Claim(**json.loads(content))
        # By its file's name it is found again; of a time that is none it would be alive for ever.
        intact = claim.owner == owner and math.isfinite(claim.renewed)
    except (ValueError, TypeError):
        intact = False
    return claim if intact else _DamagedClaim(owner, claim_url)


def _write(url: str, owner: str) -> None:
    pid = os.getpid()
    claim = _Claim(owner, socket.gethostname(), _boot_id(), pid, _started(pid), time.time())
    storage.write_bytes(_claim_url(url, owner), json.dumps(asdict(claim)).encode())


def _boot_id() -> str:
    """Identifies this machine since its last start, and the container whose process numbers we see.

    It is empty where the system does not tell.
    """
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return ""
    return boot.read_text().strip() + (f" {processes.readlink()}" if processes.is_symlink() else "")


def _started(pid: int) -> str:
    """Start of a process of this machine, in ticks since its boot; empty if there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The second field, the program's name in brackets, may itself hold blanks and brackets.
    return status.rpartition(")")[2].split()[19]
