"""Single values of a job set anew: by `--set` of the command line, and by each trial of a search."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from aim_profile.files.place import Place, did_you_mean, keys_at
from aim_profile.files.read import parse_yaml
from aim_trainer.errors import JobError

if TYPE_CHECKING:
    from .job import FineTuningJob, Spec

_PART = re.compile(r"([A-Za-z][A-Za-z0-9]*)((?:\[[0-9]{1,4}\])*)")
#: More levels than a job has.
_DEEPEST = 32


class Override(NamedTuple):
    """`spec.hyperparameters.learningRate=1e-4`. value None: back to the default."""

    written: str
    place: Place
    value: Any


def parse_override(text: str) -> Override:
    """Raises JobError where it is no `path=value`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise JobError(f"--set {text}: no =", field="set", value=text, remedy="write spec.KEY.KEY=VALUE")
    place = place_of(name)
    if place is None:
        raise JobError(
            f"--set {text}: {name!r} is no path of keys", field="set", value=text, remedy="write spec.KEY.KEY=VALUE"
        )
    return Override(text, place, parse_yaml(value, f"--set {text}", JobError))


def place_of(path: str) -> Place | None:
    """`dataset.sources[0].weight` as ("dataset", "sources", 0, "weight"); None where it is no such path."""
    place: list[str | int] = []
    if path.count(".") > _DEEPEST:
        return None
    for part in path.split("."):
        found = _PART.fullmatch(part)
        if found is None:
            return None
        place += [found[1], *(int(index) for index in re.findall(r"[0-9]+", found[2]))]
    return tuple(place)


def with_value(raw: Any, place: Place, value: Any) -> Any:
    """A copy of `raw` with the value at `place`, mappings made on the way; None takes the key away.

    Raises LookupError where `raw` has no such list item, or something else than a mapping stands in the way.
    """
    if not place:
        return value
    part, rest = place[0], place[1:]
    if isinstance(part, int):
        if not isinstance(raw, list) or part >= len(raw):
            raise LookupError(f"[{part}]")
        return [*raw[:part], with_value(raw[part], rest, value), *raw[part + 1 :]]
    if not isinstance(raw, Mapping | None):
        raise LookupError(part)
    copy = dict(raw or {})
    if not rest and value is None:
        copy.pop(part, None)
    else:
        copy[part] = with_value(copy.get(part), rest, value)
    return copy


def with_parameters(job: FineTuningJob, values: Mapping[str, int | float | str | bool]) -> FineTuningJob:
    """The job of one trial: names as search.parameters has them (from spec on), the search itself left out.

    A whole number is set as one, whatever its type: 8.0 of a sampler is rank 8. Raises JobError naming the parameter.
    """
    raw: Any = job.model_dump(by_alias=True, exclude_unset=True, mode="json")
    raw["spec"].pop("search", None)
    name = ""
    try:
        for name, value in values.items():
            raw["spec"] = with_value(raw["spec"], place_of(name) or (name,), _whole(value))
        return type(job).model_validate(raw)
    except (ValidationError, LookupError) as problem:
        told = ", ".join(f"{key}: {value!r}" for key, value in values.items())
        raise JobError(f"{told}: {_first(problem, type(job))}", field=name, value=told) from problem


def problem_with(spec: Spec, name: str, value: int | float | str | bool) -> str | None:
    """Why that value cannot stand at that name (from spec on), None where it can."""
    place = place_of(name)
    if place is None or place[0] == "search":
        return f"{name}: not a field of the job; as in hyperparameters.learningRate"
    raw = spec.model_dump(by_alias=True, exclude_unset=True, exclude={"search"}, mode="json")
    try:
        type(spec).model_validate(with_value(raw, place, _whole(value)))
    except (ValidationError, LookupError) as problem:
        return f"{name}: {value!r}: {_first(problem, type(spec))}"
    return None


def _whole(value: int | float | str | bool) -> int | float | str | bool:
    return int(value) if isinstance(value, float) and value == int(value) else value


def _first(problem: ValidationError | LookupError, model: type[BaseModel]) -> str:
    if isinstance(problem, LookupError):
        return f"there is no {problem.args[0]}"
    first = problem.errors(include_url=False)[0]
    if first["type"] == "extra_forbidden":
        *place, word = first["loc"]
        return f"there is no such field; {did_you_mean(str(word), keys_at(model, place))}"
    return first["msg"].removeprefix("Value error, ")
