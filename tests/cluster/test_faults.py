"""Processes and nodes that die, hang or are taken away under a real training: it goes on, and soon.

Recovery is measured from the fault to the first line of training of the next start, which is
later than the first update by up to LOG images.
"""

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cluster.launch import launch
from cluster.nodes import ray_connection
from pipeline import lease, run_folder
from pipeline.training.checkpoint import images_saved
from pipeline.training.watchdog import Limits
from tests.cluster.processes import Command, command, kill, nodes
from tests.tiny_run import Home, points

pytestmark = pytest.mark.campaign

ENDLESS = 400_000
LOG = 20
RARELY_SAVED = "cadence.checkpoint_images=40000"
WORKER_SECONDS = 60.0
NODE_SECONDS = 90.0
LEAVE_SECONDS = 30.0
# The growth of a run need not be waited for five minutes.
EAGER = (
    sys.executable,
    "-c",
    "from cluster import cli, supervision; supervision.GROW_SECONDS = 5.0; cli.main()",
)


def arguments(name: str, workers: str, *more: str, total: int = ENDLESS) -> list[str]:
    return [
        *("train", "tiny.yaml", "--name", name, "--workers", workers, f"train.total_images={total}"),
        *(f"cadence.log_images={LOG}", f"cadence.checkpoint_images={LOG}", "cadence.evaluate_images=400000"),
        *more,
    ]


def trains(training: Command, after: float = 0.0) -> float:
    """When it said the first line of its curves after the moment; waits for it."""
    return training.line_with(" bits/dim", after)


def recovered(training: Command, fault: Callable[[], object], within: float) -> float:
    """Commit a fault on a training that runs; returns how many seconds it took to train again."""
    trains(training)
    moment = time.monotonic()
    fault()
    continued = training.line_with("Continuing at", after=moment)
    seconds = trains(training, after=continued) - moment
    print(f"trains again {seconds:.0f} s after the fault")
    assert seconds < within, training.said
    return seconds


def stopped(training: Command, home: Home, name: str) -> None:
    """End a training in order; not an image is lost then."""
    training.send(signal.SIGTERM)
    assert training.wait() == 0, training.said
    assert run_folder.known_record(home.store, name).state == "stopped"
    url = home.run_url(name)
    assert images_saved(url) >= max(at for _, at in points(url))
    assert lease.holder(url) is None


def widths(home: Home, name: str) -> list[int]:
    return [launch.workers for launch in run_folder.known_record(home.store, name).launches]


def test_a_killed_worker_is_replaced_within_a_minute(home: Home) -> None:
    with command(*arguments("killed-worker", "2")) as training:
        recovered(training, lambda: kill(training.workers(2)[1]), WORKER_SECONDS)
        assert "Lost worker" in training.said
        stopped(training, home, "killed-worker")


def test_the_command_of_a_killed_driver_goes_on_at_once(home: Home) -> None:
    with command(*arguments("killed-driver", "2")) as training:
        trains(training)
        kill(training.pid)
    began = time.monotonic()
    with command(*arguments("killed-driver", "2")) as again:
        assert again.line_with("Continuing at") - began < WORKER_SECONDS
        stopped(again, home, "killed-driver")


def test_without_its_ray_a_command_ends_soon_and_can_be_repeated(home: Home) -> None:
    with command(*arguments("killed-ray", "2")) as training:
        trains(training)
        kill(*training.processes("gcs_server"))
        began = time.monotonic()
        assert training.wait() != 0
        assert time.monotonic() - began < WORKER_SECONDS
    with command(*arguments("killed-ray", "2")) as again:
        again.line_with("Continuing at")
        stopped(again, home, "killed-ray")


def test_a_run_goes_on_with_fewer_nodes_and_grows_when_they_return(home: Home) -> None:
    with (
        nodes(1, 1) as cluster,
        command(*arguments("elastic", "1:2"), program=EAGER, RAY_ADDRESS=cluster.address) as training,
    ):
        recovered(training, lambda: cluster.kill(1), NODE_SECONDS)
        cluster.add()
        wider = training.line_with("There is room for 2 workers")
        trains(training, after=training.line_with("Continuing at", after=wider))
        stopped(training, home, "elastic")
    assert widths(home, "elastic") == [2, 1, 2]
    record = run_folder.known_record(home.store, "elastic")
    assert record.config["train"]["micro_batch_size"] == record.config["train"]["batch_size"] // 2


def test_a_run_of_a_fixed_width_waits_for_its_nodes(home: Home) -> None:
    with (
        nodes(1, 1) as cluster,
        command(*arguments("waits", "2"), RAY_ADDRESS=cluster.address) as training,
    ):
        trains(training)
        cluster.kill(0)
        waiting = training.line_with("Waiting for 2 free CPUs")
        cluster.add()
        trains(training, after=training.line_with("Continuing at", after=waiting))
        stopped(training, home, "waits")
    assert widths(home, "waits") == [2, 2]


def test_a_node_that_is_drained_is_left_with_no_image_lost(home: Home) -> None:
    with (
        nodes(1, 1) as cluster,
        command(*arguments("drained", "1:2", RARELY_SAVED), RAY_ADDRESS=cluster.address) as training,
    ):
        trains(training)
        drained = time.monotonic()
        cluster.drain(1)
        left = training.line_with("is being taken away", after=drained)
        assert left - drained < LEAVE_SECONDS
        continued = training.line_with("Continuing at", after=left)
        trains(training, after=continued)
        stopped(training, home, "drained")
    assert widths(home, "drained") == [2, 1]
    check_nothing_was_lost(training, left)


def test_a_worker_that_is_told_to_end_saves_first(home: Home) -> None:
    with command(*arguments("told", "2", RARELY_SAVED)) as training:
        trains(training)
        told = time.monotonic()
        os.kill(training.workers(2)[0], signal.SIGTERM)
        left = training.line_with("was told to end", after=told)
        assert left - told < LEAVE_SECONDS
        trains(training, after=training.line_with("Continuing at", after=told))
        stopped(training, home, "told")
    check_nothing_was_lost(training, left)


def check_nothing_was_lost(training: Command, moment: float) -> None:
    """What was seen up to a moment was saved, although no checkpoint was due."""
    shown = [line.split()[0] for at, line in training.lines if " bits/dim" in line and at < moment]
    continued = next(line.split()[2] for _, line in training.lines if line.startswith("Continuing at"))
    assert int(continued.replace(",", "")) >= int(shown[-1].replace(",", ""))


def test_a_signal_to_all_processes_of_a_command_ends_it_in_order(home: Home) -> None:
    with command(*arguments("all", "2")) as training:
        trains(training)
        began = time.monotonic()
        training.send(signal.SIGTERM, to_group=True)
        assert training.wait() == 0, training.said
        assert time.monotonic() - began < LEAVE_SECONDS
    assert run_folder.known_record(home.store, "all").state == "stopped"


def test_a_worker_that_is_frozen_is_named_and_replaced(home: Home) -> None:
    with command(*arguments("frozen", "2", "train.stall_seconds=30")) as training:
        trains(training)
        frozen = time.monotonic()
        os.kill(training.workers(2)[1], signal.SIGSTOP)
        named = training.line_with("has not been heard of", after=frozen)
        assert named - frozen < 45
        trains(training, after=training.line_with("Continuing at", after=named))
        stopped(training, home, "frozen")


def test_a_rank_that_sleeps_for_ever_is_named_and_the_run_goes_on(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, stacks = hung(home, monkeypatch, "work_hung_once", Limits(stall_seconds=20, stall_steps=1))
    assert [line for line in said if line.startswith("Ended, for worker 1 hangs at")] != []
    assert stacks.keys() == {"0", "1"}
    assert "asleep_for_ever" in stacks["1"]
    assert "asleep_for_ever" not in stacks["0"]


def test_a_first_rank_that_sleeps_when_the_others_have_gone_home_is_named(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The end of a run may take twenty times as long as an update.
    said, stacks = hung(home, monkeypatch, "work_hung_at_the_end_once", Limits(5, 1))
    ended = {re.sub(r" at .*", "", line) for line in said if line.startswith("Ended, for ")}
    assert ended == {"Ended, for worker 0 hangs"}
    assert stacks.keys() == {"0"}
    assert "asleep_for_ever" in stacks["0"]


def hung(
    home: Home, monkeypatch: pytest.MonkeyPatch, entry: str, limits: Limits
) -> tuple[list[str], dict[str, str]]:
    """The lines of a launch that hangs once and is finished, and the stacks of its ranks."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = home.begin(entry, "train.total_images=160", workers=2)
    said: list[str] = []
    with ray_connection(2):
        end = launch(
            f"tests.cluster.entries:{entry}",
            vars(spec),
            widths=(2,),
            run_url=spec.url,
            say=said.append,
            progress=partial(images_saved, spec.url),
            limits=limits,
        )
    assert end["state"] == "finished"
    return said, {file.name[-5:-4]: file.read_text() for file in Path(spec.url, "files").glob("stacks-*")}


def test_a_command_that_is_interrupted_twenty_times_starts_at_once_again(home: Home) -> None:
    dice = random.Random(7)
    for _ in range(20):
        with command(*arguments("interrupted", "2")) as training:
            training.line_with("Starting")
            time.sleep(dice.uniform(0, 25))
            training.send(signal.SIGINT, to_group=True)
            assert training.wait() == 0, training.said
    last = images_saved(home.run_url("interrupted"))
    with command(*arguments("interrupted", "2", total=last + 8)) as training:
        assert training.wait() == 0, training.said
    assert images_saved(home.run_url("interrupted")) == last + 8
