"""Published checkpoints as models of ours: the same mathematics, measured, registered, or refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from nvae.model import NVAE
from pipeline import importing, storage
from pipeline.artifacts import tensors_from_bytes
from pipeline.data.index import load_index
from pipeline.importing import Imported
from pipeline.models.export import load_directory
from pipeline.models.registry import Registry, load
from pipeline.untrusted.published import Received, UntrustedError
from pipeline.untrusted.reading import read
from tests.nvae.published_cases import Case, cases
from tests.nvae.test_published import as_bytes, training_state
from tests.nvae.test_published_parity import assert_all_good, evaluation
from tests.pipeline.models.tiny import tiny_model
from tests.tiny_run import Home


def published_model(seed: int = 0, **changes: Any) -> NVAE:
    """A model of 8x8 pixels that the published code could have trained."""
    return tiny_model(seed, groups_per_scale=[1, 2], published_compatibility=True, **changes)


def checkpoint(folder: Path, model: NVAE | None = None, **weights: Tensor) -> str:
    state = training_state(model or published_model())
    state["state_dict"] |= weights
    path = folder / "checkpoint.pt"
    path.write_bytes(as_bytes(state))
    return str(path)


def imported(source: str, data: str | None = None, *overrides: str, draws: int = 1) -> Imported:
    """From a file of our own, which is opened in this process: another takes a second to start."""
    with Path(source).open("rb") as file:
        answer, weights = read(file, Path(source).stat().st_size)
    received = Received(**answer, weights=tensors_from_bytes(weights, source), sha256="5" * 64, layers=())
    index = load_index(data) if data else None
    return importing.accept(received, source, None, ["sampling.count=2", *overrides], index, draws, 4)


@pytest.mark.parametrize("case", cases())
def test_an_imported_model_evaluates_as_the_published_code_did(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = case.load()
    url = importing.write(imported(str(case.path / "checkpoint.pt")), str(tmp_path / "model"))
    loaded = load_directory(url)
    assert loaded.config.model == recorded.config
    ours = dataclasses.replace(recorded, model=loaded.model)
    monkeypatch.setattr(Case, "load", lambda _: ours)
    assert_all_good(evaluation(case))


def test_weights_are_what_was_saved_and_count_as_seen_what_the_checkpoint_says(tmp_path: Path) -> None:
    model = published_model()
    state = training_state(model)
    state["args"].batch_size, state["args"].num_process_per_node = 5, 2
    (tmp_path / "checkpoint.pt").write_bytes(as_bytes(state))
    found = imported(str(tmp_path / "checkpoint.pt"))
    assert found.images_seen == 12 * 5 * 2
    assert found.config.train.batch_size == 10
    for name, value in found.model.state_dict().items():
        if not name.startswith("spectral."):
            assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    "changes", [{"likelihood": "bernoulli", "image_channels": 1}, {"likelihood": "normal"}]
)
def test_models_of_other_likelihoods_are_checked_on_images_that_they_know(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    border = {"border_pixels": 2} if "image_channels" in changes else {}
    found = imported(checkpoint(tmp_path, published_model(**changes, **border)))
    assert found.config.model.likelihood == changes["likelihood"]


def test_what_is_measured_is_registered_and_only_that_can_be_the_best(home: Home, tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    unmeasured = importing.register(imported(source), "faces", home.store, home.tracking)
    assert (unmeasured.version.ref, unmeasured.is_best) == ("models:/faces/1", False)
    data = storage.join(home.store, "data", "tiny")
    for _ in range(2):
        measured = importing.register(imported(source, data, draws=2), "faces", home.store, home.tracking)
        assert (measured.version.ref, measured.is_best) == ("models:/faces/2", True)
    version = measured.version
    assert version.metrics["validation/images"] == 6
    assert version.metrics["validation/importance_weighted_bits_per_dim"] > 0
    assert version.data_hash != importing.NOT_MEASURED
    assert load("models:/faces@best", home.tracking).config.data.root == data
    run = MlflowClient(home.tracking).get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["imported.from"] == source
    assert MlflowClient(home.tracking).get_model_version("faces", "2").tags["imported.from"] == source
    assert run.data.params["model.latent_channels"] == "2"
    assert run.data.metrics["validation/bits_per_dim"] == pytest.approx(version.score)
    # The same import again was the same run.
    runs = {each.run_id for each in Registry(home.tracking).versions("faces")}
    assert len(runs) == 2


def test_a_checkpoint_in_a_bucket_is_imported_to_a_bucket(tmp_path: Path, s3: str) -> None:
    url = storage.join(s3, "published", "checkpoint.pt")
    storage.write_bytes(url, Path(checkpoint(tmp_path)).read_bytes())
    found = importing.take_in(url, None, ["sampling.count=2"], None, 1, 4)
    written = importing.write(found, storage.join(s3, "published", "model"))
    assert load_directory(written).model.config == published_model().config


def test_the_published_peculiarities_can_be_left_behind(tmp_path: Path) -> None:
    found = imported(checkpoint(tmp_path), None, "model.published_compatibility=false")
    assert not found.model.config.published_compatibility
    assert torch.equal(found.model.stem.weight, published_model().stem.weight)


@pytest.mark.parametrize("compatible", ["true", "false"])
def test_cells_that_the_first_batch_changes_are_exported_as_they_were_saved(
    compatible: str, tmp_path: Path
) -> None:
    model = published_model(cell_family="res_elu")
    found = imported(checkpoint(tmp_path, model), None, f"model.published_compatibility={compatible}")
    written = importing.write(found, str(tmp_path / "model"))
    state, saved = load_directory(written).model.state_dict(), model.state_dict()
    for name, value in saved.items():
        if not name.startswith("spectral."):
            assert torch.equal(state[name], value), name


DAMAGE = {
    "nan": ("stem.bias", torch.full((4,), torch.nan), "stem.bias is not finite"),
    "infinity": ("stem.bias", torch.full((4,), torch.inf), "stem.bias is not finite"),
    "negative variance": (
        "post_process.0._ops.0.conv.1.bn.running_var",
        torch.full((8,), -1.0),
        "computes nan bits/dim on 4 drawn portraits",
    ),
    "half precision": ("stem.bias", torch.zeros(4).half(), r"is float16 \(4,\), not float32"),
    "another shape": ("stem.bias", torch.zeros(5), "do not fit"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_that_are_no_model_are_refused(kind: str, tmp_path: Path) -> None:
    name, value, reason = DAMAGE[kind]
    with pytest.raises(UntrustedError, match=reason):
        imported(checkpoint(tmp_path, **{name: value}))
