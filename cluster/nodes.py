"""What the cluster has: a connection to it, places for workers on nodes that live, nodes that leave.

Ray counts a node that was killed as alive until enough health checks have failed, 15 seconds
by default. Where a new group of workers is to start just after such a loss, each node's own
port is asked as well: that of a dead process refuses at once.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Read by Ray when it is imported. Lines are forwarded by the board, and a worker stays in the
# directory it was started in. Nodes that leave are looked for by the driver.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# A dead worker is noticed within a second, one that answers nothing within two minutes, and
# nobody waits a minute for a place on a node that died meanwhile.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "120")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")

import ray
from ray._private.state import state as ray_state

from pipeline.run_folder import RunError

GCS_SILENCE_SECONDS = 10
"""Without its control service a local Ray is lost; then the command ends, to be run again."""
ANSWER_SECONDS = 2.0
"""Longest wait for a node's port."""
SETTLE_SECONDS = 15.0
"""How long the places of a lost group may take to become free again."""
LINE_SECONDS = 300.0
"""Between two lines about waiting for nodes."""
LOOK_SECONDS = 1.0


@contextmanager
def ray_connection(workers: int) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or a Ray of our own on this machine."""
    address = os.environ.get("RAY_ADDRESS", "local")
    # More ranks than cores are allowed on one machine: they are slow, not wrong.
    limits = {
        "num_cpus": max(workers, os.cpu_count() or 1),
        "include_dashboard": False,
        "_system_config": {"gcs_rpc_server_reconnect_timeout_s": GCS_SILENCE_SECONDS},
    }
    started_here = not ray.is_initialized()
    if started_here:
        with _signals_kept():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level="ERROR",
                **(limits if address == "local" else {}),
            )
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Start Ray without giving our SIGTERM away, nor that of its processes.

    Ray puts a handler of its own in the place of ours. Its processes inherit that the signal is
    blocked: one that is sent to all processes of a job, as service managers do, would otherwise
    end Ray's before the training has written its checkpoint. They end with this process.
    """
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        # In any other thread Ray has put none.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@dataclass(frozen=True)
class Places:
    """Workers that nodes can hold: one per GPU where there are any, else one per CPU."""

    kind: str
    """GPU or CPU."""
    total: int
    """On living nodes that stay."""
    free: int
    """Those of them that nobody uses."""


def places(kind: str) -> Places:
    """What the living nodes that are not about to leave can hold."""
    leaving = leaving_nodes()
    free_by_node = ray_state.available_resources_per_node()
    total = free = 0
    for node in ray.nodes():
        number = int(node["Resources"].get(kind, 0)) if node["Alive"] else 0
        if number and node["NodeID"] not in leaving and _answers(node):
            total += number
            free += int(free_by_node.get(node["NodeID"], {}).get(kind, 0))
    return Places(kind, total, free)


def kind_of_places() -> str:
    """What a worker needs one of: a GPU if the cluster has any, or a CPU."""
    return "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"


def check_holds(resources: Mapping[str, float]) -> None:
    """Raises RunError if no living node has all of these amounts at once."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in resources.items()) for node in there):
        asked = ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
        most = ", ".join(
            f"{name}={max((node.get(name, 0) for node in there), default=0):g}" for name in resources
        )
        raise RunError(f"No node of the cluster has {asked}; the most that a node has: {most}.")


def leaving_nodes() -> set[str]:
    """Ray's numbers of the nodes that are being drained: about to be taken away, or scaled down."""
    return set(ray_state.get_draining_nodes())


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node's raylet takes connections."""
    try:
        with socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_SECONDS
        ):
            return True
    except OSError:
        return False


def widest(widths: Sequence[int], places: int) -> int:
    """The largest of the `widths` that so many places hold; 0 if none of them does."""
    return max((width for width in widths if width <= places), default=0)


def wait_for_places(
    widths: Sequence[int], kind: str, say: Callable[[str], None], unwanted: Callable[[], bool]
) -> int:
    """How many workers to start: as many as can be now, waiting until that is one of the `widths`.

    Returns 0 as soon as `unwanted()`. A Ray of our own never grows: there too few places are a
    RunError. A cluster may get its nodes back.
    """
    began, said = time.monotonic(), -LINE_SECONDS
    while not unwanted():
        there = places(kind)
        best = widest(widths, there.total)
        settled = time.monotonic() - began > SETTLE_SECONDS
        now = widest(widths, there.free)
        if now and (now == best or settled):
            return now
        if not best and _is_local():
            raise RunError(
                f"{widths[0]} workers were asked for, but the cluster has {there.total} {kind}s; "
                f"use --workers {there.total} or fewer."
            )
        if (not best or settled) and time.monotonic() - said > LINE_SECONDS:
            said = time.monotonic()
            say(
                f"Waiting for {widths[0]} free {kind}s: the cluster has {there.total}, of which "
                f"{there.free} are free ..."
            )
        time.sleep(LOOK_SECONDS)
    return 0


def _is_local() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") == "local"
