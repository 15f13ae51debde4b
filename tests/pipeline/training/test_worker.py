import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pipeline.training.checkpoint import images_saved
from pipeline.training.worker import LocalWorker, Poll
from tests.tiny_run import Home


def handlers() -> list[object]:
    return [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]


def test_one_process_is_the_whole_world() -> None:
    worker = LocalWorker(torch.device("cpu"))
    model, tensor = nn.Linear(2, 2), torch.arange(3.0)
    assert (worker.rank, worker.world_size) == (0, 1)
    assert worker.wrap(model) is model
    assert worker.all_reduce(tensor) is tensor
    assert tensor.tolist() == [0, 1, 2]
    worker.barrier()


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    assert LocalWorker().device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_wish_to_stop(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with LocalWorker() as worker:
        assert not worker.stop_requested()
        os.kill(os.getpid(), number)
        assert worker.stop_requested()
        assert worker.stop_requested()
    assert number.name in capfd.readouterr().err


@pytest.fixture
def usual_interrupts() -> Iterator[None]:
    """Python's own handler, which is not there if the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_interrupt_interrupts(usual_interrupts: None) -> None:
    with pytest.raises(KeyboardInterrupt), LocalWorker() as worker:
        os.kill(os.getpid(), signal.SIGINT)
        assert worker.stop_requested()
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_as_before_once_the_worker_is_left() -> None:
    before = handlers()
    with LocalWorker():
        assert handlers() != before
    assert handlers() == before
    with LocalWorker():
        os.kill(os.getpid(), signal.SIGTERM)
    assert handlers() == before


def test_a_worker_in_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = handlers(), []

    def work() -> None:
        with LocalWorker() as worker:
            seen.append((handlers(), worker.stop_requested()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_a_wish_to_stop_may_come_another_way() -> None:
    wishes = iter([False, True])
    worker = LocalWorker(asked_to_stop=lambda: next(wishes))
    assert [worker.stop_requested(), worker.stop_requested()] == [False, True]


def test_a_wish_to_stop_takes_effect_after_the_very_update(home: Home) -> None:
    """Between two log lines and two checkpoints."""
    worker = LocalWorker(asked_to_stop=lambda: worker.pulse.read().images_seen >= 20)
    assert home.train("stopped-in-time", worker=worker)["state"] == "stopped"
    assert images_saved(home.run_url("stopped-in-time")) == 24


def test_a_question_is_asked_until_the_answer_is_yes() -> None:
    answers = iter([False, False, True])
    with Poll(lambda: next(answers), seconds=0.001) as asked:
        for thread in threading.enumerate():
            if thread.name == "poll":
                thread.join(10)
        assert asked()


def test_a_question_that_fails_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    def answers() -> Iterator[bool]:
        yield False
        yield True

    found, failures = answers(), iter([RuntimeError("cannot schedule new futures"), KeyError("x")])

    def question() -> bool:
        for failure in failures:
            raise failure
        return next(found)

    with Poll(question, seconds=0.001) as asked:
        for thread in threading.enumerate():
            if thread.name == "poll":
                thread.join(10)
        assert asked()
    assert "cannot schedule new futures" in caplog.text
