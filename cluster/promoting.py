"""`nvae registry promote`, `rollback` and `history`: from what the user typed to an alias that moved, or not.

The gate judges by an evaluation of the candidate and of the alias's holder on the same images with
the same draws. One that `nvae evaluate` has noted at a version counts if it is of these; otherwise it is
made now and noted. Damaged files, weights or scores that are no numbers cannot be forced: whoever
wants such a model has to register it anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster import evaluating
from cluster.models import tracking_uri
from pipeline import storage
from pipeline import store as stores
from pipeline.code_version import code_version
from pipeline.data.index import VALIDATION, Index, load_index
from pipeline.errors import FailedError, InputError
from pipeline.models.evaluation_record import evaluation_tag
from pipeline.models.export import LoadedModel
from pipeline.models.names import RegistryError
from pipeline.models.promotion import Promotions, UnfitError, new_entry, verified
from pipeline.models.promotion_history import (
    ACCEPTED,
    OVERTAKEN,
    PROMOTION,
    REASON_CHARACTERS,
    ROLLBACK,
    Basis,
    Line,
    check_alias,
)
from pipeline.models.registry import Registry
from pipeline.models.versions import Version
from pipeline.progress import say
from pipeline.width import Workers

ROUNDS = 20
"""How often a candidate is compared anew with a holder that came meanwhile, before it gives up."""


@dataclass(frozen=True)
class Asked:
    """What both sides are evaluated on."""

    root: str
    """Data set, a URL."""
    is_own: bool
    """Whether that is the candidate's own because nobody named another."""
    draws: int
    limit: int | None
    batch_size: int
    seed: int
    workers: Workers | None
    store: str | None
    tracking: str

    @property
    def criterion(self) -> str:
        name = "importance_weighted_bits_per_dim" if self.draws > 1 else "bits_per_dim"
        return f"validation/{name}"


def promote(
    model: str,
    alias: str,
    data: str | None,
    samples: int,
    limit: int | None,
    batch_size: int,
    seed: int,
    workers: Workers | None,
    force: bool,
    reason: str,
    store: str | None,
    tracking: str | None,
) -> dict[str, Any]:
    """What became of it, as facts; "outcome" is "accepted", "refused" or "unchanged"."""
    check_alias(alias)
    _check_reason(reason, needed=force)
    uri = tracking_uri(store, tracking)
    candidate = Registry(uri).find(model if model.startswith("models:") else f"models:/{model}")
    promotions = Promotions(uri, candidate.name)
    _settled(promotions, candidate.name, alias)
    asked = Asked("", data is None, samples, limit, batch_size, seed, workers, store, uri)
    facts: dict[str, Any] = {"reason": reason, "forced": force, "code_version": code_version()}
    for _ in range(ROUNDS):
        step = promotions.holder(alias)
        holder = None if step is None else step.version
        if holder == candidate.version:
            return {
                "outcome": "unchanged",
                "why": f"{candidate.ref} is {alias} already",
                "model": candidate.ref,
            }
        found = _examined(promotions, candidate, holder, data, asked)
        entry = new_entry(PROMOTION, alias, candidate.version, holder, **facts, **found)
        line = promotions.append(entry, candidate.run_id)
        if line.outcome != OVERTAKEN:
            break
    _settled(promotions, candidate.name, alias, quietly=True)
    return _facts(candidate.name, line)


def rollback(name: str, alias: str, reason: str, store: str | None, tracking: str | None) -> dict[str, Any]:
    """Returns the alias to the newest of its former holders that still verifies; facts of it."""
    check_alias(alias)
    _check_reason(reason, needed=False)
    uri = tracking_uri(store, tracking)
    promotions, registry = Promotions(uri, name), Registry(uri)
    promotions.aliases()
    _settled(promotions, name, alias)
    steps = promotions.history().steps(alias)
    unfit = []
    for step in reversed(steps[:-1]):
        try:
            version = registry.find(f"models:/{name}/{step.version}")
            verified(version, uri)
        except UnfitError as error:
            unfit.append(f"version {step.version} is passed over: {error}")
            say(unfit[-1])
            continue
        except storage.StoreError:
            raise
        except RegistryError as error:
            if promotions.exists(step.version):
                raise
            unfit.append(f"version {step.version} is passed over: {error}")
            say(unfit[-1])
            continue
        entry = new_entry(
            ROLLBACK, alias, step.version, steps[-1].version, reason=reason, code_version=code_version()
        )
        line = promotions.append(entry, version.run_id)
        _settled(promotions, name, alias, quietly=True)
        return _facts(name, line)
    raise RegistryError(
        f"There is nothing to go back to: the history of {name} has no former holder of {alias!r} that "
        f"is whole. `nvae registry history {name}` shows it." + "".join(f"\n{each}" for each in unfit)
    )


def history(
    name: str, alias: str | None, store: str | None, tracking: str | None
) -> Iterator[dict[str, Any]]:
    """A row for each attempt, the oldest first. Raises RegistryError if there is no such model."""
    promotions = Promotions(tracking_uri(store, tracking), name)
    aliases, found = promotions.aliases(), promotions.history()
    for line in found.lines:
        if alias is None or line.entry is None or line.entry.alias == alias:
            yield _facts(name, line)
    for each in sorted({line.entry.alias for line in found.lines if line.entry} & {alias or "", *aliases}):
        steps = found.steps(each)
        if steps and aliases.get(each) != steps[-1].version:
            say(
                f"{each} is at version {aliases.get(each, 'none')}, its history at version "
                f"{steps[-1].version}: somebody moved it in MLflow, or was killed. "
                "The next promotion or rollback puts it right."
            )


def _check_reason(reason: str, *, needed: bool) -> None:
    if needed and not reason.strip():
        raise InputError('--force needs --reason "TEXT": it is recorded why the gate was passed by.')
    if len(reason) > REASON_CHARACTERS:
        raise InputError(f"--reason has {len(reason)} characters; {REASON_CHARACTERS} at most are recorded.")


def _settled(promotions: Promotions, name: str, alias: str, *, quietly: bool = False) -> None:
    before = promotions.settle(alias)
    if before is not None and not quietly:
        say(f"{alias} of {name} was at {before}, past its history: it is back where the history has it.")


def _examined(
    promotions: Promotions, candidate: Version, holder: str | None, data: str | None, asked: Asked
) -> dict[str, Any]:
    """What the gate is told of a candidate and the alias's holder."""
    try:
        loaded = verified(candidate, asked.tracking)
    except UnfitError as error:
        return {"problem": str(error)[:1000]}
    storage.configure(loaded.config.storage)
    root = stores.data_url(data or loaded.config.data.root, stores.locate(asked.store))
    asked = Asked(**(vars(asked) | {"root": root}))
    index = load_index(root)
    basis, score = _scored(promotions, candidate, loaded, index, asked)
    found: dict[str, Any] = {"basis": basis, "score": score}
    if holder is None:
        return found
    try:
        return found | {"holder_score": _score_of_holder(promotions, candidate, holder, basis, index, asked)}
    except _IncomparableError as error:
        return found | {"incomparable": str(error)[:1000]}


class _IncomparableError(Exception):
    """The holder cannot be measured by the measure of the candidate; why."""


def _score_of_holder(
    promotions: Promotions, candidate: Version, number: str, basis: Basis, index: Index, asked: Asked
) -> float:
    try:
        holder = Registry(asked.tracking).find(f"models:/{candidate.name}/{number}")
    except RegistryError as error:
        if promotions.exists(number):
            raise
        raise _IncomparableError(f"version {number}, which has the alias, is gone: {error}") from error
    try:
        loaded = verified(holder, asked.tracking)
    except UnfitError as error:
        raise _IncomparableError(f"version {number}, which has the alias, is damaged: {error}") from error
    if _pixels(loaded) != basis.pixels:
        raise _IncomparableError(
            f"version {number} models {_pixels(loaded)}, this one {basis.pixels}: their scores cannot be "
            "compared"
        )
    if asked.is_own and holder.data_hash != candidate.data_hash:
        raise _IncomparableError(
            f"version {number} was trained on another data set; name the one that both are to be judged on "
            "with --data"
        )
    theirs, score = _scored(promotions, holder, loaded, index, asked)
    if theirs != basis:
        raise _IncomparableError(f"version {number} could be evaluated on {theirs.images} images only")
    return score


def _scored(
    promotions: Promotions, version: Version, loaded: LoadedModel, index: Index, asked: Asked
) -> tuple[Basis, float]:
    """The version's score as it was noted, or as it is found now."""
    there = index.num_samples(VALIDATION)
    images = there if asked.limit is None else min(asked.limit, there)
    same = {"data_hash": index.content_hash, "draws": asked.draws, "seed": asked.seed}
    name, _ = evaluation_tag({**same, "unused_groups": [], "scores": {"validation/images": images}})
    noted = promotions.recorded_evaluation(version, name) or {}
    score = noted.get(asked.criterion)
    matches = noted.get("validation/images") == images and all(noted.get(key) == same[key] for key in same)
    if not matches or isinstance(score, bool) or not isinstance(score, int | float):
        say(f"Evaluating {version.ref} on {images:,} images ...")
        scores = _evaluated(version, asked)
        images, score = int(scores["validation/images"]), scores[asked.criterion]
    trained_on = version.data_hash if asked.is_own else ""
    data = index.content_hash
    basis = Basis(asked.criterion, data, images, asked.draws, asked.seed, _pixels(loaded), trained_on)
    return basis, float(score)


def _evaluated(version: Version, asked: Asked) -> dict[str, float]:
    answer = evaluating.evaluate(
        version.ref,
        asked.root,
        asked.draws,
        asked.limit,
        asked.batch_size,
        asked.seed,
        asked.workers,
        True,
        asked.store,
        asked.tracking,
    )
    if answer["state"] != "finished":
        raise FailedError(
            f"The evaluation of {version.ref} was stopped; nothing was promoted. Repeat the command."
        )
    scores: dict[str, float] = answer["scores"]
    return scores


def _pixels(loaded: LoadedModel) -> str:
    model = loaded.config.model
    return (
        f"{model.image_channels} x {model.image_size} x {model.image_size} pixels of {model.pixel_bits} bits "
        f"({model.likelihood})"
    )


def _facts(name: str, line: Line) -> dict[str, Any]:
    entry = line.entry
    if entry is None:
        return {"number": line.number, "outcome": "unreadable", "why": line.why}
    fields = {key: value for key, value in vars(entry).items() if key not in ("version", "holder", "basis")}
    basis = {} if entry.basis is None else vars(entry.basis)
    return {
        "number": line.number,
        "outcome": line.outcome,
        "why": line.why,
        "model": f"models:/{name}/{entry.version}",
        "from": entry.holder,
        "to": entry.version,
        **fields,
        **basis,
    }


def went_through(facts: dict[str, Any]) -> bool:
    """Whether the alias is now where the user wanted it."""
    return facts["outcome"] in (ACCEPTED, "unchanged")
