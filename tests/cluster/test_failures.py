"""What is tried again, how often, and what the user is told."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from cluster.failures import LONGEST_PAUSE_SECONDS, MAX_ERRORS, MAX_LOSSES, Failures, RefusedError
from pipeline.errors import FailedError
from pipeline.run_folder import RunError

GONE = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError("died"))
MISSES_IT = RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:2439")
BUG = ZeroDivisionError("a bug of ours")


def failed(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("all of them", dict(enumerate(errors)))


def test_a_lost_worker_is_named_and_not_who_misses_it() -> None:
    failures = Failures(lambda: 0)
    assert failures.note(failed(MISSES_IT, GONE), "") == 0
    assert failures.last == "Lost worker 1"


def test_losses_are_tried_again_at_ever_longer_intervals_and_then_given_up() -> None:
    failures = Failures(lambda: 0)
    pauses = [failures.note(failed(MISSES_IT, GONE), "") for _ in range(MAX_LOSSES)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0, LONGEST_PAUSE_SECONDS)
    assert sum(pauses) > 600
    with pytest.raises(FailedError, match="Lost worker 1"):
        failures.note(failed(MISSES_IT, GONE), "")


def test_an_error_of_a_workers_own_is_given_up_soon_and_shown() -> None:
    failures = Failures(lambda: 0)
    for _ in range(MAX_ERRORS):
        failures.note(failed(MISSES_IT, BUG), "")
        assert failures.last == "A worker failed (ZeroDivisionError: a bug of ours)"
    with pytest.raises(FailedError, match="a bug of ours"):
        failures.note(failed(MISSES_IT, BUG), "")


def test_a_run_that_comes_further_may_fail_for_ever() -> None:
    images = iter(range(1000))
    failures = Failures(lambda: next(images))
    assert {failures.note(failed(BUG), "") for _ in range(10 * MAX_ERRORS)} == {0}


def test_a_start_that_found_no_place_is_a_loss() -> None:
    failures = Failures(lambda: 0)
    for _ in range(MAX_LOSSES):
        failures.note(ControllerError(WorkerGroupStartupTimeoutError(2)), "")


def test_a_group_that_was_ended_failed_for_that_reason() -> None:
    failures = Failures(lambda: 0)
    failures.note(failed(GONE, GONE), "Ended, for worker 1 hangs")
    assert failures.last == "Ended, for worker 1 hangs"


@pytest.mark.parametrize(("is_input", "kind"), [(True, RunError), (False, FailedError)])
def test_what_the_user_has_to_mend_is_raised_at_once(is_input: bool, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="the data are gone"):
        Failures(lambda: 0).note(failed(MISSES_IT, RefusedError("the data are gone", is_input)), "")


def test_losses_do_not_count_as_errors_of_a_workers_own() -> None:
    failures = Failures(lambda: 0)
    for _ in range(MAX_ERRORS):
        failures.note(failed(MISSES_IT, GONE), "")
        failures.note(failed(BUG), "")
    with pytest.raises(FailedError, match="a bug of ours"):
        failures.note(failed(BUG), "")


def test_the_loss_of_the_process_that_leads_the_workers_passes() -> None:
    failures = Failures(lambda: 0)
    for _ in range(MAX_LOSSES):
        failures.note(ActorDiedError(), "")
    assert failures.last.startswith("Lost a worker (ActorDiedError")
