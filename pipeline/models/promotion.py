"""Moving an alias past a gate: where the history of a model's aliases is, and how the alias follows it.

MLflow has neither a lock nor a compare-and-swap, and setting a tag overwrites silently. But it gives
the versions of a registered model their numbers: next to a model NAME stands another one,
"NAME promotions", and each of *its* versions is an entry of NAME's history, created together with the
tag that holds it in one transaction. The number is part of the database's primary key. So two
writers never get one number, number n + 1 is given only after n can be read by all, and a number whose
version was deleted is not given again: the history is linear without a lock. That name has a space, so it can
be no model of ours, and no command takes it for one.

The history decides; the alias follows it (`settle`). What a crash leaves:

- before the entry is created: nothing;
- before the alias is moved: an entry whose version has not got the alias yet. The next promotion or rollback
  of that alias, the same command repeated among them, moves it first; `history` says meanwhile that it lags;
- a request whose answer was lost is repeated; entries have ids, and the second counts for nothing.

Several who move the alias at once each look at the history again after they moved it. The one who moved it
last has moved it to the holder, or moves it once more.
"""

import getpass
import json
import math
import os
import random
import socket
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from pipeline import storage
from pipeline.artifacts import read_verified
from pipeline.models.connection import Connection
from pipeline.models.evaluation_record import PREFIX
from pipeline.models.export import LoadedModel
from pipeline.models.names import RegistryError, UnreachableError, check_name
from pipeline.models.promotion_history import Entry, History, Line, Step, read, written
from pipeline.models.registry import Registry, load
from pipeline.models.versions import Version
from pipeline.training.mlflow_client import THERE

_ENTRY = "entry"
TRIES_SECONDS = 20.0
"""How long an entry is tried to be created: of many at once, a database turns some away."""


class UnfitError(RegistryError):
    """A version that must not have an alias, whatever its score: files or weights are damaged."""


def history_name(name: str) -> str:
    """The registered model whose versions are the history of the model `name`."""
    return f"{check_name(name)} promotions"


def verified(version: Version, tracking_uri: str) -> LoadedModel:
    """The model of a version, every file read and compared with the registered hashes, weights finite.

    Raises UnfitError if something is damaged, missing or not a number; StoreError if the store
    cannot be asked, which says nothing about the version.
    """
    try:
        loaded = load(version.ref, tracking_uri)
        for name in loaded.manifest.files:
            read_verified(loaded.manifest, name)
    except (storage.StoreError, RegistryError) as error:
        cause = error if isinstance(error, storage.StoreError) else error.__cause__
        if isinstance(error, UnreachableError):
            raise
        if isinstance(cause, storage.StoreError) and not isinstance(
            cause, (storage.MissingError, storage.CutError)
        ):
            raise cause from None
        raise UnfitError(str(error)) from error
    except ValueError as error:
        raise UnfitError(f"{version.ref}: {error}") from error
    broken = [name for name, tensor in loaded.model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UnfitError(f"{version.ref}: {len(broken)} tensors are not finite, {broken[0]} the first.")
    return loaded


class Promotions:
    """The history of one model's aliases, in MLflow. Every method raises UnreachableError if that is away."""

    def __init__(self, tracking_uri: str, name: str) -> None:
        self._mlflow = Connection(tracking_uri)
        self._registry = Registry(tracking_uri)
        self._name, self._history_name = name, history_name(name)

    def history(self) -> History:
        """As it is now. Entries are read in the order of their numbers, so pages do not shift."""
        found = self._mlflow.pages(
            lambda mlflow, token: mlflow.search_model_versions(
                f"name = '{self._history_name}'",
                max_results=1000,
                order_by=["version_number ASC"],
                page_token=token,
            )
        )
        return History(
            (int(version.version), read(self._name, version.tags.get(_ENTRY, ""))) for version in found
        )

    def aliases(self) -> dict[str, str]:
        """Alias -> version, as MLflow has them. Raises RegistryError if there is no such model."""
        model = self._mlflow.unless_missing(lambda mlflow: mlflow.get_registered_model(self._name))
        if model is None:
            raise RegistryError(f"There is no registered model {self._name!r} in {self._mlflow.shown}.")
        return {alias: str(version) for alias, version in model.aliases.items()}

    def exists(self, number: str) -> bool:
        """Whether MLflow has that version of the model, ours or not."""
        found = self._mlflow.unless_missing(lambda mlflow: mlflow.get_model_version(self._name, number))
        return found is not None

    def holder(self, alias: str) -> Step | None:
        """Who has the alias: by the history, or, if it knows nothing of it, by MLflow."""
        steps = self.history().steps(alias)
        if steps:
            return steps[-1]
        version = self.aliases().get(alias)
        return None if version is None else Step(version)

    def append(self, entry: Entry, run_id: str) -> Line:
        """Records the attempt, of a version that `run_id` trained; what became of it. Moves nothing."""
        self._mlflow.ask(
            lambda mlflow: mlflow.create_registered_model(
                self._history_name, description=f"The history of the aliases of {self._name}. Not a model."
            ),
            but=THERE,
        )
        tags = {_ENTRY: written(self._name, entry)}

        def create(mlflow: Any) -> Any:
            return mlflow.create_model_version(
                self._history_name, f"runs:/{run_id}/model", run_id=run_id, tags=tags, await_creation_for=0
            )

        return self._persisted(lambda: self._mlflow.ask(create), entry.id)

    def _persisted(self, create: Callable[[], Any], entry_id: str) -> Line:
        """Creates the entry unless an earlier try, whose answer was lost, did."""
        until = time.monotonic() + TRIES_SECONDS
        while True:
            try:
                create()
            except UnreachableError:
                line = self.history().line(entry_id)
                if line is None and time.monotonic() > until:
                    raise
            else:
                line = self.history().line(entry_id)
                if line is None:
                    raise RegistryError(
                        f"An entry of {self._history_name!r} was created and is not there: somebody deletes "
                        "its versions. Nothing was moved."
                    )
            if line is not None:
                return line
            time.sleep(random.uniform(0.05, 0.5))

    def settle(self, alias: str) -> str | None:
        """Gives the alias to whom the history names; where it was, if that was elsewhere. See above."""
        before = None
        while True:
            steps = self.history().steps(alias)
            found = self.aliases().get(alias)
            if not steps or found == steps[-1].version:
                return before
            try:
                self._registry.point(alias, f"models:/{self._name}/{steps[-1].version}")
            except UnreachableError:
                raise
            except RegistryError:
                return before  # The holder was deleted in MLflow, and the alias with it.
            before = before or found or "nobody"

    def recorded_evaluation(self, version: Version, tag: str) -> dict[str, Any] | None:
        """The figures that `nvae evaluate` noted at a version under `tag`; None if they are not there."""
        if not tag.startswith(PREFIX):
            raise ValueError(f"{tag!r} is no evaluation's tag")
        found = self._mlflow.unless_missing(
            lambda mlflow: mlflow.get_model_version(version.name, version.version)
        )
        try:
            figures = json.loads(found.tags[tag]) if found is not None else None
        except (KeyError, ValueError, RecursionError):
            return None
        return figures if isinstance(figures, dict) else None


def new_entry(
    kind: str, alias: str, version: str, holder: str | None, code_version: str, **rest: Any
) -> Entry:
    """An attempt of this user, now. A score that is not finite is None."""
    for name in ("score", "holder_score"):
        value = rest.get(name)
        rest[name] = value if value is not None and math.isfinite(value) else None
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    return Entry(uuid.uuid4().hex, kind, alias, version, holder, _who(), when, code_version, **rest)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = f"user {os.getuid()}"  # A container may have no name for it.
    return f"{user}@{socket.gethostname()}"
