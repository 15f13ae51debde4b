"""Fixtures for the whole suite: calm threads, a place with a tiny data set, a real S3 server.

What costs seconds is made once, when a test first asks for it.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.data import shards
from tests import s3_server
from tests.fault_proxy import FaultProxy
from tests.mlflow_server import MlflowServer, serving
from tests.tiny_run import IMAGES, YAML, Home

# For tiny models: on a busy machine several threads wait for each other most of the time.
torch.set_num_threads(1)

BUCKET = "tests"


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own cache folder is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One store for the tests that take care to use run names of their own."""
    home = Home(tmp_path_factory.mktemp("home"))
    Path(home.yaml).write_text(YAML)
    target = f"{home.store}/data/tiny"
    shards.build(f"portraits:{IMAGES}", target, image_size=16, validation_fraction=0.25)
    return home


@pytest.fixture(scope="session")
def _mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database. Making its tables takes seconds, so others are copies of it."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def empty_mlflow(_mlflow_tables: Path, tmp_path: Path) -> str:
    """The address of an MLflow of the test's own, without any run."""
    shutil.copyfile(_mlflow_tables, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="session")
def mlflow_server(_mlflow_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server for all tests, which leave it running."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(_mlflow_tables, folder / "mlflow.db")
    with serving(folder) as server:
        yield server


@pytest.fixture
def home(shared_home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The working directory of a test, with nothing in the environment that leads elsewhere."""
    for name in ("NVAE_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(shared_home.folder)
    return shared_home


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://tests`, an empty bucket of a real S3 server, whose AWS_* settings are in the environment.

    All tests share the bucket; each works below a folder of its own.
    """
    if not s3_server.PYTHON.exists():
        pytest.fail("no S3 server: `make .venv-s3/installed` installs one")
    with (
        s3_server.serving(tmp_path_factory.mktemp("s3")) as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name, value in server.client.items():
            environment.setenv(name, value)
        s3_server.make_bucket(BUCKET)
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def _shared_proxy(s3: str) -> Iterator[FaultProxy]:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        yield proxy


@pytest.fixture
def fault_proxy(_shared_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """A proxy in front of the S3 server, without any rule yet, to which AWS_ENDPOINT_URL_S3 leads.

    Its address is the same for all tests, so that they share one client.
    """
    _shared_proxy.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", _shared_proxy.url)
    return _shared_proxy
