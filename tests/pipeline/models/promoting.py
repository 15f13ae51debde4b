"""Attempts to promote versions whose scores are known: what the command does once evaluations are there."""

from concurrent.futures import ThreadPoolExecutor

from mlflow import MlflowClient

from pipeline.models.promotion import Promotions, new_entry
from pipeline.models.promotion_history import ACCEPTED, OVERTAKEN, PROMOTION, ROLLBACK, Basis

NAME, ALIAS = "nvae-faces", "champion"
BASIS = Basis("validation/bits_per_dim", "d1" * 32, 7, 1, 0, "3 x 8 x 8 pixels of 8 bits (mixture)")
TAGS = {
    "weights.url": "/x",
    "weights.sha256": "x",
    "manifest.sha256": "x",
    "images_seen": "1",
    "data.hash": "d",
}


def with_versions(uri: str, count: int) -> str:
    """Versions 1.. of NAME, whose weights nobody looks at here; the run that made them."""
    client = MlflowClient(uri, uri)
    run_id = client.create_run(client.create_experiment("nvae")).info.run_id
    client.create_registered_model(NAME)
    for _ in range(count):
        client.create_model_version(NAME, f"runs:/{run_id}/model", run_id=run_id, tags=TAGS)
    return run_id


def attempt(uri: str, run_id: str, version: int, score: float) -> str:
    """As the command does it once evaluations are there; what became of it."""
    promotions = Promotions(uri, NAME)
    while True:
        step = promotions.holder(ALIAS)
        holder = None if step is None else step.version
        rest = {"basis": BASIS, "score": score}
        line = promotions.append(new_entry(PROMOTION, ALIAS, str(version), holder, "1", **rest), run_id)
        if line.outcome != OVERTAKEN:
            promotions.settle(ALIAS)
            return line.outcome


def return_to(uri: str, run_id: str, holder: int, version: int) -> str:
    promotions = Promotions(uri, NAME)
    outcome = promotions.append(new_entry(ROLLBACK, ALIAS, str(version), str(holder), "1"), run_id).outcome
    promotions.settle(ALIAS)
    return outcome


def check_race(uri: str, racers: int) -> None:
    run_id = with_versions(uri, racers)
    scores = [2 + (7 * n % racers) / racers for n in range(racers)]
    with ThreadPoolExecutor(racers) as pool:
        ended = list(pool.map(lambda n: attempt(uri, run_id, n + 1, scores[n]), range(racers)))
    promotions = Promotions(uri, NAME)
    best = scores.index(min(scores))
    assert promotions.aliases() == {ALIAS: str(best + 1)}
    assert ended[best] == ACCEPTED
    lines = promotions.history().lines
    assert [line.number for line in lines] == list(range(1, racers + 1))
    assert sorted(int(line.entry.version) for line in lines if line.entry) == list(range(1, racers + 1))
    steps = [step.score for step in promotions.history().steps(ALIAS)]
    assert steps == sorted(steps, key=lambda score: -(score or 0))
