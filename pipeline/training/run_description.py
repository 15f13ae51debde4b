"""What an MLflow run is made from: noted in the run's folder first, so that it can be made later.

RUN/journal/mlflow.json    the description; whatever happens while MLflow makes the run of it,
                           the run is found again by the key that it carries

Nothing here asks MLflow, and no password gets through.
"""

import json
import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.errors import InputError
from pipeline.run_folder import State

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
"""In MLflow's words; KILLED is a run that was stopped and may be continued."""

PARENT_TAG = "mlflow.parentRunId"
"""By which MLflow shows a run below another."""

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
# MLflow's limits.
_PARAMETER_LENGTH, _TAG_LENGTH = 6000, 8000

# To the last @ of the host's part: a password may hold one itself.
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/\s]*@")
_SECRET_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:signature|token|password|secret|credential|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)

logger = logging.getLogger(__name__)


class TrackingError(InputError):
    """A tracking server or run that cannot be used as asked."""


@dataclass(frozen=True)
class RunDescription:
    """What an MLflow run is made from; free of secrets."""

    key: str
    """Unique to this run of ours, in all of MLflow."""
    experiment: str
    run_name: str
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


def describe(
    run_url: str, experiment: str, run_name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> RunDescription:
    """The description of the run at `run_url`, noted in its folder, with the key that it has there."""
    known = read_description(run_url)
    key = known.key if known else uuid.uuid4().hex
    description = described(key, experiment, run_name, parameters, tags)
    write_description(run_url, description)
    return description


def described(
    key: str, experiment: str, run_name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]
) -> RunDescription:
    """The description of a run that has no folder, as MLflow stores it."""
    return RunDescription(
        key=key,
        experiment=experiment,
        run_name=run_name,
        parameters={name: _as_parameter(value) for name, value in parameters.items()},
        tags={name: as_tag(value) for name, value in tags.items()},
    )


def write_description(run_url: str, description: RunDescription) -> None:
    storage.write_bytes(_url(run_url), json.dumps(asdict(description), indent=2).encode())


def read_description(run_url: str) -> RunDescription | None:
    """The description in a run's folder; None if there is none, or with a warning if it is damaged.

    Without its key the MLflow run is known by what was noted of deliveries, or is made anew.
    """
    try:
        return RunDescription(**json.loads(storage.read_bytes(_url(run_url))))
    except storage.MissingError:
        return None
    except (ValueError, TypeError) as error:
        logger.warning("%s is damaged and will be written again: %s", _url(run_url), error)
        return None


def _url(run_url: str) -> str:
    return storage.join(run_url, "journal", "mlflow.json")


def status_of(state: State) -> Status:
    """What MLflow calls the state of a run that nobody is running.

    Who was killed could not record it: their runs say that they are running.
    """
    return "FINISHED" if state == "finished" else "FAILED" if state in ("failed", "diverged") else "KILLED"


def check_tracking_uri(uri: str) -> None:
    """Raises TrackingError if MLflow cannot know what `uri` means."""
    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else ""
    if scheme not in _SCHEMES:
        raise TrackingError(
            f"{redact(uri)!r} is no address of MLflow: give http(s)://HOST:PORT or sqlite:////PATH/mlflow.db."
        )


def redact(text: str) -> str:
    """`text` without the passwords and signatures of the URLs in it."""
    return _SECRET_IN_QUERY.sub(r"\1***", _USER_AND_PASSWORD.sub("", text))


def _as_parameter(value: Any) -> str:
    """A setting as MLflow stores it: text as it is, all else as JSON; cut at MLflow's limit."""
    return _cut(redact(value if isinstance(value, str) else json.dumps(value)), _PARAMETER_LENGTH)


def as_tag(value: str) -> str:
    """A tag as MLflow stores it, cut at its limit."""
    return _cut(redact(value), _TAG_LENGTH)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
