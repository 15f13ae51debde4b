"""The model registry: which models there are, which is the best, and how to get one back.

A registered version is an MLflow model version whose tags hold its identity (versions.py).
The weights stay in the store; MLflow gets the small files, as artifacts of the run that
trained the model, and the version's source is `runs:/RUN_ID/model`: a `file://` source is
refused by a tracking server.

Loading goes from the tags to the manifest to the files, each verified against the one before,
so neither a changed store nor an artifact of the tracking server can slip in other weights.
`mlflow.*.load_model` is never called: it executes code that comes with a model.

The alias `best` is moved by a gate and not by whoever came last (`versions.judge`).
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.artifacts import MANIFEST, Manifest, damaged_files, read_manifest, read_verified
from pipeline.errors import InputError
from pipeline.models.connection import Connection
from pipeline.models.export import (
    CARD,
    FORMAT,
    FORMAT_VERSION,
    SMALL_FILES,
    WEIGHTS,
    LoadedModel,
    load_directory,
    read_settings,
)
from pipeline.models.names import (
    NAME,
    RegistryError,
    UnreachableError,
    check_name,
    no_alias,
    no_model,
    no_version,
    parse_reference,
)
from pipeline.models.versions import (
    Version,
    best_of,
    is_ours,
    judge,
    parse_version,
    version_tags,
    when,
)
from pipeline.settings import flatten
from pipeline.training.mlflow_client import THERE

BEST = "best"

_PASSED = "best.passed"


@dataclass(frozen=True)
class Registration:
    """A registered version, and what became of the alias `best`."""

    version: Version
    is_best: bool
    verdict: str
    """A sentence: whether the version is the best one now, and why (not)."""


def load(ref: str, tracking_uri: str) -> LoadedModel:
    """The model that `ref` names, in eval mode on the CPU; every file verified.

    `ref` is models:/NAME@ALIAS, models:/NAME/VERSION, or the path or URL of an export or of a
    training checkpoint; for these two MLflow is not asked. Raises RegistryError for every
    reason why there is no such model or why it cannot be trusted.
    """
    if not ref.startswith("models:"):
        return load_directory(ref)
    version = Registry(tracking_uri).find(ref)
    loaded = load_directory(version.url, ref, version.manifest_sha256)
    found = loaded.manifest.files[WEIGHTS].sha256
    if found != version.weights_sha256:
        raise RegistryError(
            f"{ref}: the tag weights.sha256 is {version.weights_sha256[:12]}, the weights in "
            f"{storage.shown(version.url)} have {found[:12]}. Somebody changed the tag; register again."
        )
    return loaded


class Registry:
    """The registered models of one MLflow: a database (`sqlite:///...`) or a server.

    Every method raises UnreachableError if MLflow cannot be reached or refuses. Time limits follow the
    server's pace from call to call.
    """

    def __init__(self, tracking_uri: str) -> None:
        self._mlflow = Connection(tracking_uri)

    # -- looking up -----------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every registered model, in alphabetical order."""
        models = self._mlflow.pages(
            lambda mlflow, token: mlflow.search_registered_models(max_results=1000, page_token=token)
        )
        return sorted(model.name for model in models if NAME.fullmatch(model.name))

    def versions(self, name: str) -> list[Version]:
        """The versions of one model that were registered by this project, the newest first.

        Raises RegistryError if there is no such model.
        """
        return self._search(name, self._aliases(name))

    def find(self, ref: str) -> Version:
        """The version that models:/NAME@ALIAS or models:/NAME/VERSION means.

        Raises RegistryError if there is none, with what there is instead.
        """
        asked = parse_reference(ref)
        aliases = self._aliases(asked.name)
        if asked.alias is None:
            return self._get(asked.name, str(asked.version), aliases)
        if asked.alias not in aliases:
            raise no_alias(asked.name, asked.alias, aliases)
        return self._get(asked.name, aliases[asked.alias], aliases)

    def _aliases(self, name: str) -> dict[str, str]:
        """Alias -> version of one model. Only the model has them: a search finds versions without.

        Version numbers are int from a database and str from a server; here they are str.
        Raises RegistryError if there is no such model.
        """
        check_name(name)
        model = self._mlflow.unless_missing(lambda mlflow: mlflow.get_registered_model(name))
        if model is None:
            raise no_model(name, self._mlflow.shown, self.names())
        return {alias: str(version) for alias, version in model.aliases.items()}

    def _get(self, name: str, number: str, aliases: Mapping[str, str]) -> Version:
        found = self._mlflow.unless_missing(lambda mlflow: mlflow.get_model_version(name, number))
        if found is None:
            raise no_version(name, number, [version.version for version in self.versions(name)[:10]])
        if not is_ours(found.tags):
            raise RegistryError(
                f"models:/{name}/{number} was not registered by nvae: its tags do not say where weights lie. "
                "Use what registered it to load it."
            )
        return _parse(found, aliases)

    def _search(self, name: str, aliases: Mapping[str, str], condition: str = "") -> list[Version]:
        """Our versions of one model, which exists, that have all these tags; newest first."""
        filter_string = f"name = '{name}'{condition}"
        found = self._mlflow.pages(
            lambda mlflow, token: mlflow.search_model_versions(
                filter_string, max_results=10_000, page_token=token
            )
        )
        versions = [_parse(version, aliases) for version in found if is_ours(version.tags)]
        return sorted(versions, key=lambda version: int(version.version), reverse=True)

    # -- registering ----------------------------------------------------------------------

    def register(self, url: str, name: str) -> Registration:
        """Registers the export in the folder `url` as a version of `name`, and judges it.

        The same weights under the same name, measured on the same data, are one version, which is
        returned again, so that a registration that was interrupted can be repeated. Raises RegistryError if a
        file of the export is gone or cut short.
        """
        check_name(name)
        try:
            manifest = read_manifest(url, format=FORMAT, version=FORMAT_VERSION)
            damaged = damaged_files(manifest)
            if damaged:
                raise RegistryError(f"{', '.join(damaged)} is gone or cut short; export the model again.")
            self._mlflow.ask(lambda mlflow: mlflow.create_registered_model(name), but=THERE)
            version = self._same_weights(name, manifest) or self._create_version(name, manifest)
        except InputError as error:
            raise RegistryError(f"{storage.shown(url)} cannot be registered. {error}") from error
        return self._contend(version)

    def _same_weights(self, name: str, manifest: Manifest) -> Version | None:
        condition = f" and tags.`weights.sha256` = '{manifest.files[WEIGHTS].sha256}'"
        found = self._search(name, self._aliases(name), condition)
        measured_alike = [each for each in found if each.data_hash == manifest.fields["data_hash"]]
        return measured_alike[-1] if measured_alike else None

    def _create_version(self, name: str, manifest: Manifest) -> Version:
        run_id = str(manifest.fields["run_id"])
        # Exports of earlier releases have no card.
        files = {name: read_verified(manifest, name) for name in SMALL_FILES if name in manifest.files}
        # A temporary directory is readable by this user alone.
        with tempfile.TemporaryDirectory(prefix="nvae-register-") as folder:
            for name_of_file, data in files.items():
                (Path(folder) / name_of_file).write_bytes(data)
            (Path(folder) / MANIFEST).write_bytes(storage.read_bytes(storage.join(manifest.url, MANIFEST)))
            self._mlflow.ask(lambda mlflow: mlflow.log_artifacts(run_id, folder, "model"))
            created = self._mlflow.ask(
                lambda mlflow: mlflow.create_model_version(
                    name,
                    f"runs:/{run_id}/model",
                    run_id=run_id,
                    tags=version_tags(manifest, WEIGHTS, dict(flatten(read_settings(manifest)))),
                    description=str(files.get(CARD, b""), "utf-8") or None,
                    await_creation_for=0,
                )
            )
        return _parse(created, {})

    # -- the alias `best` -----------------------------------------------------------------

    def _contend(self, candidate: Version) -> Registration:
        """Gives `candidate` the alias `best` if the gate lets it."""
        holder = self._holder(candidate.name)
        passes, reason = judge(candidate, holder)
        if passes and (holder is None or holder.version != candidate.version):
            winner = self._crown(candidate)
            if winner.version != candidate.version:
                passes, reason = judge(candidate, winner)
        version = self.find(candidate.ref)
        return Registration(
            version, passes, f"{version.ref} is {'' if passes else 'not '}the best: {reason}."
        )

    def _holder(self, name: str) -> Version | None:
        """The version that is `best`; None if there is none whose score could be compared."""
        aliases = self._aliases(name)
        if BEST not in aliases:
            return None
        found = self._mlflow.unless_missing(lambda mlflow: mlflow.get_model_version(name, aliases[BEST]))
        return _parse(found, aliases) if found is not None and is_ours(found.tags) else None

    def _crown(self, candidate: Version) -> Version:
        """Moves `best` to `candidate`, or to a better one that came at the same moment; the winner.

        MLflow cannot compare and swap. So whoever passes the gate is marked before it takes
        the alias, and whoever took the alias looks at the marks afterwards and hands it on to
        the best. Of several at once, the one that moves it last has seen the marks of all.
        """
        name, winner = candidate.name, candidate
        self.note(candidate, {_PASSED: "true"})
        while True:
            self._move(BEST, winner)
            passed = self._search(name, {}, f" and tags.`{_PASSED}` = 'true'")
            best = best_of(version for version in passed if version.data_hash == candidate.data_hash)
            if best is None or best.score >= winner.score:
                return winner
            winner = best

    def point(self, alias: str, ref: str) -> None:
        """Makes `alias` that of the version `ref`, whatever had it before. `best` has a gate: `register`."""
        self._move(alias, self.find(ref))

    def note(self, version: Version, tags: Mapping[str, str]) -> None:
        """Adds tags to a version, or gives those that it has these values.

        MLflow does not remember when a tag was set. Describing the version as it is described already
        moves its time of change, by which catalogues elsewhere notice the tags.
        """
        for key, value in tags.items():
            self._mlflow.ask(
                lambda mlflow, key=key, value=value: mlflow.set_model_version_tag(  # type: ignore[misc]
                    version.name, version.version, key, value
                )
            )

        def touch(mlflow: Any) -> None:
            described = mlflow.get_model_version(version.name, version.version).description
            mlflow.update_model_version(version.name, version.version, described or "An NVAE.")

        self._mlflow.ask(touch)

    def _move(self, alias: str, version: Version) -> None:
        def move(mlflow: Any) -> None:
            mlflow.set_registered_model_alias(version.name, alias, version.version)

        try:
            self._mlflow.ask(move)
        except UnreachableError:
            # Of two that create the alias at once, the database refuses one; now it is there.
            self._mlflow.ask(move)


def _parse(version: Any, aliases: Mapping[str, str]) -> Version:
    """Our view of MLflow's ModelVersion."""
    return parse_version(
        name=version.name,
        version=str(version.version),
        created=when(version.creation_timestamp),
        run_id=version.run_id or "",
        tags=version.tags,
        aliases=aliases,
    )
