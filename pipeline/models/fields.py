"""The names by which versions are looked up, and what each means of a version.

model, version, alias, run, trial, parent, code, created, ended, images_seen, world_size, licence
data                                   the data set: its name, its place, or the beginning of its hash
validation.NAME                        a metric of the end of the training, such as validation.bits_per_dim
evaluation.NAME                        a metric of `nvae evaluate`; of several evaluations that with the most
                                       images, of those that with the most draws
fid, precision, recall                 of the samples; of several measurements that of the most samples
objective.spectral_coefficient, ...    every setting by its dotted path

The names are those of the YAML, of MLflow's parameters and of `nvae config explain`. A metric's
groups are written validation.kl_nats.group_00; a slash instead of a dot means the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from pipeline.errors import InputError
from pipeline.models.versions import Version
from pipeline.settings import nearest, settings

Kind = Literal["number", "text", "setting"]


class FieldError(InputError):
    """A name that versions are not looked up by."""


@dataclass(frozen=True)
class Field:
    """Something that a version may be asked for."""

    name: str
    kind: Kind
    """`setting` may be anything that YAML has."""
    values: Callable[[Version], tuple[Any, ...]]
    """What it is of a version: one value; none if the version lacks it; several aliases."""
    by_prefix: bool = False
    """Whether the beginning of a hash is enough."""

    def value(self, version: Version) -> Any:
        """The only or first value; None if the version has none."""
        return next(iter(self.values(version)), None)


def field(name: str) -> Field:
    """The field of this name; raises FieldError with the nearest name if there is none."""
    dotted = name.replace("/", ".")
    if dotted in _FIELDS:
        return _FIELDS[dotted]
    if dotted in settings():
        return Field(dotted, "setting", lambda version: _present(version.settings.get(dotted)))
    prefix, _, metric = dotted.partition(".")
    if prefix == "validation" and metric:
        return Field(dotted, "number", lambda version: _present(version.metrics.get(_slashed(dotted))))
    if prefix == "evaluation" and metric:
        return Field(dotted, "number", lambda version: _present(_evaluated(version, metric)))
    raise FieldError(f"{name!r} is nothing that models are looked up by.{_suggestion(dotted)}")


def known_metrics(version: Version) -> set[str]:
    """The names of all metrics that a version has, as they are written in a query."""
    evaluated = {name for evaluation in version.evaluations for name in evaluation.metrics}
    return {name.replace("/", ".") for name in version.metrics} | {
        name.replace("/", ".").replace("validation.", "evaluation.", 1) for name in evaluated
    }


def _evaluated(version: Version, metric: str) -> Any:
    if not version.evaluations:
        return None
    evaluation = version.evaluations[0]
    if metric in ("draws", "seed"):
        return getattr(evaluation, metric)
    return evaluation.metrics.get(_slashed(f"validation.{metric}"))


def _slashed(dotted: str) -> str:
    return dotted.replace(".", "/")


def _present(value: Any) -> tuple[Any, ...]:
    return () if value is None or value == "" else (value,)


def _data(version: Version) -> tuple[str, ...]:
    root = version.data_root.rstrip("/")
    names = {root, root.rpartition("/")[2], root.rpartition("/")[2].rpartition(":")[2]}
    return (version.data_hash, *sorted(names - {""}))


_PLAIN: Mapping[str, tuple[Kind, Callable[[Version], Any]]] = {
    "model": ("text", lambda version: version.name),
    "version": ("number", lambda version: int(version.version)),
    "run": ("text", lambda version: version.run_name),
    "ended": ("text", lambda version: version.run_ended),
    "trial": ("text", lambda version: version.trial),
    "parent": ("text", lambda version: version.parent),
    "code": ("text", lambda version: version.code_version),
    "created": ("text", lambda version: version.created),
    "licence": ("text", lambda version: version.data_licence),
    "images_seen": ("number", lambda version: version.images_seen),
    "world_size": ("number", lambda version: version.world_size),
}


def _quality(name: str) -> Callable[[Version], tuple[Any, ...]]:
    return lambda version: tuple(getattr(each, name) for each in version.sample_quality[:1])


def _plain(read: Callable[[Version], Any]) -> Callable[[Version], tuple[Any, ...]]:
    return lambda version: _present(read(version))


_FIELDS: Mapping[str, Field] = {
    **{name: Field(name, kind, _plain(read)) for name, (kind, read) in _PLAIN.items()},
    **{name: Field(name, "number", _quality(name)) for name in ("fid", "precision", "recall")},
    "alias": Field("alias", "text", lambda version: version.aliases),
    "data": Field("data", "text", _data, by_prefix=True),
}


def _suggestion(name: str) -> str:
    near = next(iter(get_close_matches(name, _FIELDS, n=1)), nearest(name))
    if near:
        return f" Did you mean {near}?"
    known = ", ".join(sorted(_FIELDS))
    return (
        f" There are {known}, validation.METRIC, evaluation.METRIC and every setting (nvae config explain)."
    )
