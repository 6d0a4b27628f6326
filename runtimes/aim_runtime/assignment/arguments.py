"""vLLM's flags from three places: the profile's, the settings', and those given by name, which win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from aim_runtime.settings import RuntimeSettings

from .facts import Refused

Flags = dict[str, JsonValue]

#: Flags of vLLM's HTTP server that AIM's published profiles set. Ours serves instead, so they are left out, and said.
HTTP_SERVER_FLAGS = ("disable-uvicorn-access-log", "uvicorn-log-level", "host", "port", "api-key", "root-path")
#: What settings say, too.
SIZED_BY = ("tensor-parallel-size", "max-model-len", "max-num-seqs")
#: Of a number that an engine can take: 64 bits.
_MOST_DIGITS = 18
#: Devices beyond tensor parallelism, which nothing here sizes or binds.
_OTHER_PARALLELISM = ("pipeline-parallel-size", "data-parallel-size")


def named(engine_args: Sequence[str] | Mapping[str, Any]) -> Flags:
    """The user's flags by their dashed names. A command line is read as vLLM's parser reads it: ``--a=1``, ``--a 1``,
    ``--a`` (True), ``--a 1 2`` (a list).

    Raises:
        Refused: a short option, of which nothing here can tell what it sets.
    """
    if isinstance(engine_args, Mapping):
        return {_dashed(name): value for name, value in engine_args.items()}
    found: Flags = {}
    name = ""
    for word in engine_args:
        if word.startswith("--"):
            flag, given, value = word.partition("=")
            name = _dashed(flag)
            found[name] = value if given else True
        elif not name or (word.startswith("-") and not _is_number(word)):
            raise Refused(
                f"engine_args: {word!r} is no long option",
                field="engine_args",
                value=word,
                remedy="write it out, as in --tensor-parallel-size 2",
            )
        else:
            found[name] = _with(found[name], word)
    return found


def _with(before: JsonValue, word: str) -> JsonValue:
    if before is True:
        return word
    return [*before, word] if isinstance(before, list) else [before, word]


def _dashed(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def of_profile(engine_args: Mapping[str, JsonValue]) -> tuple[Flags, tuple[str, ...]]:
    """A profile's flags as the engine takes them, and notes on those left out. AIM: null is a flag, false is none."""
    flags = {
        _dashed(name): True if value is None else value for name, value in engine_args.items() if value is not False
    }
    ours = [name for name in flags if name in HTTP_SERVER_FLAGS]
    notes = tuple(
        f"{name} of the profile is left out: it is of vLLM's own HTTP server, and ours serves" for name in ours
    )
    return {name: value for name, value in flags.items() if name not in ours}, notes


def whole_number(flags: Mapping[str, JsonValue], name: str) -> int | None:
    """A flag's number, None where it is not set. Raises Refused where it is no whole number above 0."""
    value = flags.get(name)
    if value is None:
        return None
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or len(text) > _MOST_DIGITS or not int(text):
        raise Refused(
            f"engine_args: {name} is {value if len(text) <= _MOST_DIGITS else text[:_MOST_DIGITS] + '…'!r}",
            field=name,
            value=text[:_MOST_DIGITS],
            remedy="give a whole number above 0, written out",
        )
    return int(text)


def fraction(flags: Mapping[str, JsonValue], name: str) -> float | None:
    """A flag's value between 0 and 1, None where it is not set. Raises Refused."""
    value = flags.get(name)
    if value is None:
        return None
    try:
        found = float(str(value))
    except ValueError:
        found = 0.0
    if isinstance(value, bool) or not 0 < found <= 1:
        raise Refused(
            f"engine_args: {name} is {value!r}", field=name, value=str(value), remedy="give a number above 0, at most 1"
        )
    return found


def check_parallelism(flags: Mapping[str, JsonValue]) -> None:
    """Raises Refused for more devices than tensor parallelism takes: nothing here binds them."""
    for name in _OTHER_PARALLELISM:
        if (whole_number(flags, name) or 1) > 1:
            raise Refused(
                f"engine_args: {name} {flags[name]} takes devices that this runtime does not assign",
                field=name,
                value=flags[name],
                remedy="use tensor-parallel-size, or serve replicas",
            )


def agreed(settings: RuntimeSettings, engine: str, user: Mapping[str, JsonValue]) -> dict[str, int]:
    """What settings and given flags both may say, by the flag's name, once. Raises Refused where they contradict."""
    said = (
        ("tensor-parallel-size", "partition-count", settings.partition_count),
        ("tensor-parallel-size", "tensor-parallel-size", settings.engine_options(engine).get("tensor_parallel_size")),
        ("max-model-len", "max-model-len", settings.max_model_len),
        ("max-num-seqs", "max-concurrency", settings.max_concurrency),
    )
    in_args = ((flag, f"{flag} of engine_args", whole_number(user, flag)) for flag in SIZED_BY)
    found: dict[str, tuple[str, int]] = {}
    for flag, name, value in (*said, *in_args):
        if value is None:
            continue
        before, earlier = found.setdefault(flag, (name, value))
        if earlier != value:
            raise Refused(
                f"{before} {earlier} and {name} {value} contradict each other",
                field=before,
                value=earlier,
                remedy="set one of them",
            )
    return {flag: value for flag, (_, value) in found.items()}
