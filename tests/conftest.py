"""Fixtures for the whole suite: a real S3 server, started once when a test first asks for it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SERVER_PYTHON = REPOSITORY / ".venv-s3/bin/python"
BUCKET = "tests"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://tests`, an empty bucket of a real S3 server, whose AWS_* settings are in the environment.

    All tests share the bucket; each works below a folder of its own.
    """
    if not SERVER_PYTHON.exists():
        pytest.skip("no S3 server: `make .venv-s3/installed` installs one")
    folder = tmp_path_factory.mktemp("s3")
    command = [str(SERVER_PYTHON), str(Path(__file__).parent / "s3_server.py"), str(folder)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        assert server.stdout is not None
        assert server.stdin is not None
        answer = server.stdout.readline()
        assert answer, f"the S3 server did not start; its logs are in {folder}"
        for name, value in json.loads(answer).items():
            environment.setenv(name, value)
        make_bucket(BUCKET)
        yield f"s3://{BUCKET}"
        server.stdin.close()


def make_bucket(name: str) -> None:
    """Create a bucket with the settings in the environment."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=name)
