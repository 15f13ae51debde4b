"""Models that no training of ours made, against a real MLflow."""

import math
import shutil

import pytest
from mlflow import MlflowClient

from pipeline.models.adoption import adopt
from pipeline.models.names import RegistryError
from pipeline.training.run_description import described

BITS = "validation/bits_per_dim"


def check_adoption(tracking_uri: str) -> None:
    description = described(
        "k" * 32, "adopted", "import-x", {"model.image_size": 8}, {"imported.from": "x.pt"}
    )
    scores = {BITS: 3.5, "validation/x": math.nan}
    first, again = (adopt(tracking_uri, description, scores, 7) for _ in range(2))
    assert first == again
    run = MlflowClient(tracking_uri).get_run(first)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "import-x")
    assert run.data.metrics == {BITS: 3.5}
    assert len(MlflowClient(tracking_uri).get_metric_history(first, BITS)) == 1


def test_a_model_without_a_training_gets_a_run_once(tmp_path):
    # The database is made, too.
    check_adoption(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_server_does_the_same(mlflow_server):
    check_adoption(mlflow_server)


def test_a_model_is_not_put_into_an_experiment_that_was_deleted(tmp_path, empty_database):
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'mlflow.db')}"
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(RegistryError, match="experiment 'gone' was deleted"):
        adopt(uri, described("k" * 32, "gone", "import-x", {}, {}), {}, 0)
