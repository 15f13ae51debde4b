"""`make faults` in short, without Ray: a training and its saves killed, checkpoints damaged."""

import multiprocessing
import random
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from pipeline.data.index import load_index
from pipeline.training.checkpoint import newest
from pipeline.training.checkpoint_writer import CheckpointWriter, claim_attempt
from pipeline.training.tracking import NullTracker
from pipeline.training.train import Training, train
from pipeline.training.worker import LocalWorker
from tests.faults.training import ROWS
from tests.faults.training_notes import History, Notes, history, noted
from tests.faults.training_runs import distance, place, wait_until
from tests.tiny_run import Home

UPDATES, BATCH, KILLS = 40, 4, 2
SETTINGS = (
    "data.lanes=4",
    f"train.total_images={UPDATES * BATCH}",
    "cadence.checkpoint_images=32",
    f"cadence.evaluate_images={UPDATES * BATCH}",
    "evaluation.images=1",
)


def launch(home: Home, url: str, notes: Path) -> None:
    """The whole of a process: begin to train, or go on, to the end."""
    torch.set_num_threads(1)
    config, data, worker = home.config(*SETTINGS), load_index(f"{home.store}/data/tiny"), LocalWorker()
    writer = CheckpointWriter(url, claim_attempt(url), config.checkpoint.keep, before_commit=lambda: None)
    with noted(notes, worker):
        assert train(Training(config, data, worker, NullTracker(), writer), newest(url)) == "finished"
    writer.wait()


def kill_at(images: int, notes: Notes, process: BaseProcess) -> None:
    wait_until(lambda: notes.read().images_seen() >= images or not process.is_alive(), f"{images} images", 60)
    assert process.is_alive(), "it ended before it could be killed"
    process.kill()


def test_a_training_killed_at_random_moments_ends_with_the_weights_of_an_uninterrupted_one(
    home: Home, tmp_path: Path
) -> None:
    whole, broken, notes = f"{tmp_path}/whole", f"{tmp_path}/broken", Notes(tmp_path / "notes")
    notes.folder.mkdir()
    # A server that has everything imported; a child of this process would inherit its threads.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    chance = random.Random(0)

    for images in sorted(chance.sample(range(BATCH, (UPDATES - 1) * BATCH), KILLS)):
        process = processes.Process(target=launch, args=(home, broken, notes.folder), daemon=True)
        process.start()
        try:
            kill_at(images, notes, process)
        finally:
            process.kill()
            process.join(60)
    launch(home, broken, notes.folder)
    (tmp_path / "other").mkdir()
    launch(home, whole, tmp_path / "other")

    assert len(notes.read().starts()) == KILLS + 1
    assert distance(whole, broken) == 0
    data = load_index(f"{home.store}/data/tiny")
    assert history(notes, home.config(*SETTINGS), data) == History(lost=0, repeated=0)


@pytest.mark.parametrize("name", ["save", "flip"])
def test_every_death_in_a_save_and_all_damage_is_survived(name: str) -> None:
    with place(seed=1, short=True) as here:
        row = ROWS[name](here)
    assert row.tried > 0
    assert row.survived == row.tried, "\n".join(row.broken)
