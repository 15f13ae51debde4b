"""What is done when an update was not sound: the ladder of stability.py, carried out.

Each rung is an entry of the interventions, which are in every checkpoint; a metric, a tag and a
file of the run; and a line to the user. `images_seen` never goes back: the weights of an earlier
checkpoint go on with the images after the trouble, and with other noise.

All ranks come here together, for they have the same verdict.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipeline import storage
from pipeline.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Wanted,
    checkpoints,
    checkpoints_url,
    newest,
    open_attempt,
)
from pipeline.training.interventions import (
    ROLLBACKS,
    Intervention,
    Kind,
    in_numbers,
    keep,
    left_behind,
    rollbacks,
)
from pipeline.training.stability import Verdict
from pipeline.training.state import Training, TrainState
from pipeline.training.worker import Worker

KEYS_SHOWN = 8
"""Sample keys that an intervention keeps; all of them are in the run's file of it."""
FILES = 1000
"""Interventions of a run that have a file; later ones only if weights come back, or at the end."""


class DivergedError(RuntimeError):
    """A training that goes on diverging, whatever is done; the message says why and what to do."""

    def __init__(self, message: str, good: Wanted) -> None:
        super().__init__(message)
        self.good = good
        """Which checkpoints are from before the trouble."""


def intervene(training: Training, state: TrainState, verdict: Verdict, keys: Sequence[str]) -> None:
    """Do what the verdict on the last update asks for; `keys` are this rank's samples of it.

    Raises DivergedError where it is to give up. Collective.
    """
    assert verdict.kind is not None
    config = training.config.stability
    onset = verdict.condition.onset
    all_keys = gathered(keys, training.worker)
    done = Intervention(verdict.kind, state.images_seen, verdict.reason, keys=all_keys[:KEYS_SHOWN])
    if verdict.kind is Kind.SOFTEN:
        done = replace(
            done,
            spectral_factor=config.spectral_factor,
            learning_rate_factor=config.learning_rate_factor,
        )
    if verdict.kind in ROLLBACKS:
        assert onset is not None
        done = replace(done, back_to=roll_back(training, state, onset))
    keep(state.interventions, done)
    state.counts[done.kind] += 1
    tell(training, state, all_keys)
    if verdict.kind is Kind.GIVE_UP:
        assert onset is not None
        raise DivergedError(farewell(training, state, onset), before(onset, state.interventions))


def roll_back(training: Training, state: TrainState, onset: int) -> int:
    """Put back the weights from before `onset`; returns images seen at their checkpoint, or 0.

    An update is first suspicious when its weights have gone wrong already, so that a checkpoint
    at `onset` itself will not do while there is another. The initial weights come back only if there
    is none at all of trained weights. Raises DivergedError if what would do is damaged.
    """
    # Gigabytes are read: not what an update takes.
    training.worker.mark("checkpoint", state.images_seen)
    checkpoint, url = None, training.url
    if training.checkpoints is not None:
        training.checkpoints.settle()
    if url is not None:
        try:
            wanted = before(onset, state.interventions)
            checkpoint = agreed(lambda: target(url, wanted), url, training.worker)
        except CheckpointError as error:
            raise DivergedError(
                f"the weights are in trouble since {onset:,} images and cannot go back to before: {error}",
                wanted,
            ) from error
    if checkpoint is None:
        state.begin_anew(training.config, training.initial())
    else:
        state.roll_back(checkpoint, training.config)
    # Until every rank has read it, none saves another, which may push it out.
    training.worker.barrier()
    return 0 if checkpoint is None else checkpoint.images_seen


def target(run_url: str, wanted: Wanted) -> Checkpoint | None:
    """The newest wanted checkpoint; None if the run has to begin anew. Raises CheckpointError.

    Those from before the trouble may have been deleted. The oldest sound one of trained weights is
    then worth a try: the whole training is not thrown away unasked, and if it is bad as well, the
    ladder ends with the run given up.
    """
    found = newest(run_url, wanted)
    if found is not None:
        return found
    whenever = replace(wanted, at_most=None)
    trained = [
        each.images_seen
        for each in checkpoints(run_url)
        if each.record["updates"] and whenever.takes(each.images_seen, sound=each.sound)
    ]
    return newest(run_url, replace(wanted, at_most=min(trained))) if trained else None


def before(onset: int, interventions: Sequence[Intervention] = ()) -> Wanted:
    """The checkpoints that a rollback may go to, of trouble that began at `onset` images seen.

    That is none which was saved amid an episode, and none which an earlier rollback left behind.
    """
    return Wanted(onset - 1, sound=True, left_behind=left_behind(interventions))


def agreed(choose: Callable[[], Checkpoint | None], run_url: str, worker: Worker) -> Checkpoint | None:
    """The checkpoint that rank 0 chooses: all ranks must use the same one. Collective.

    Raises CheckpointError on all ranks if `choose` does.
    """
    found, refused = None, None
    try:
        found = choose() if worker.rank == 0 else None
    except CheckpointError as error:
        refused = error
    chosen = [0, -1] if refused else [found.images_seen, found.attempt] if found else [0, 0]
    images_seen, attempt = worker.all_reduce(torch.tensor(chosen, device=worker.device)).tolist()
    if refused is not None:
        raise refused
    if attempt < 0:
        raise CheckpointError(
            f"{checkpoints_url(run_url)}: none of its checkpoints will do; rank 0 says why."
        )
    if not attempt:
        return None
    return found or open_attempt(run_url, images_seen, attempt)


def gathered(keys: Sequence[str], worker: Worker) -> tuple[str, ...]:
    """The keys of all ranks, in the order of ranks. Collective: two sums."""
    text = torch.tensor(list(json.dumps(list(keys)).encode()), device=worker.device)
    lengths = torch.zeros(worker.world_size, dtype=torch.int64, device=worker.device)
    lengths[worker.rank] = len(text)
    longest = int(worker.all_reduce(lengths).max())
    texts = torch.zeros(worker.world_size, longest, dtype=torch.int64, device=worker.device)
    texts[worker.rank, : len(text)] = text
    rows = zip(worker.all_reduce(texts).tolist(), lengths.tolist(), strict=True)
    return tuple(key for row, length in rows for key in json.loads(bytes(row[:length])))


def tell(training: Training, state: TrainState, keys: Sequence[str]) -> None:
    """Say what was done last: to the user, to MLflow, in a file of the run."""
    done, tracker = state.interventions[-1], training.tracker
    numbers = in_numbers(state.counts)
    tracker.log(numbers, at=done.images_seen)
    for name, number in numbers.items():
        if number:
            tracker.tag(name.replace("/", "."), f"{number:.0f}")
    line = f"At {done.images_seen:,} images: {in_words(done)}"
    tracker.tag("stability.last", line)
    if state.counts.total() <= FILES or done.kind not in (Kind.SKIP, Kind.CLIP):
        tracker.file(
            f"stability/{done.images_seen:012d}-{done.kind}.json",
            json.dumps({"reason": done.reason, "keys": list(keys)}, indent=2).encode(),
        )
    training.worker.say(line)


def in_words(done: Intervention) -> str:
    """What was done, and why."""
    where = "the initial weights" if done.back_to == 0 else f"the checkpoint at {done.back_to or 0:,} images"
    gentler = (
        f", spectral coefficient times {done.spectral_factor:g} and learning rate times "
        f"{done.learning_rate_factor:g} for a while"
    )
    what = {
        Kind.SKIP: "update skipped",
        Kind.CLIP: "long gradients are shortened from here on",
        Kind.ROLL_BACK: f"back to {where}, on with the next images",
        Kind.SOFTEN: f"back to {where}, on with the next images{gentler}",
        Kind.GIVE_UP: "given up",
    }
    return f"{what[done.kind]}: {done.reason}"


def farewell(training: Training, state: TrainState, onset: int) -> str:
    """Why the training ends, which samples were in it, and what to do."""
    last = state.interventions[-1]
    skipped = [
        each for each in state.interventions if each.images_seen > onset and each.kind is not Kind.CLIP
    ]
    keys = list(dict.fromkeys(key for each in reversed(skipped) for key in each.keys))
    files = "" if training.url is None else f" (more in {storage.shown(training.url)}/files/stability)"
    return (
        f"{last.reason}, at {last.images_seen:,} images, after {rollbacks(state.counts)} rollbacks. "
        f"Skipped were, among others, {', '.join(keys[:KEYS_SHOWN])}{files}. Look at these samples; raise "
        "objective.spectral_coefficient or lower optimizer.learning_rate in a new run; or allow more "
        "with stability.max_rollbacks and the same command."
    )
