"""Another trainer's configuration becomes a job, key by key, by a table. What has no place in a job is refused by name.

A key whose value is null was not set there, and is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from aim_profile.files.place import Place
from aim_profile.files.read import check, read_parsed
from aim_trainer.errors import JobError

from .job import API_VERSION, FineTuningJob
from .override import place_of, with_value

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".zst", ".gz", ".txt")


class Draft:
    """A job in the making. notes: what is carried over with a difference; refused: what cannot be."""

    def __init__(self, raw: Mapping[str, Any], folder: Path) -> None:
        self.raw, self.folder = raw, folder
        self.spec: Any = {}
        self.notes: list[str] = []
        self.refused: list[str] = []
        #: Whether weights are spread over workers there.
        self.shards = False

    def set(self, path: str, value: Any) -> None:
        """A value at a path from spec on."""
        place: Place = place_of(path) or (path,)
        self.spec = with_value(self.spec, place, value)

    def note(self, text: str) -> None:
        """A difference that a reader of the job should know of."""
        self.notes.append(text)

    def refuse(self, key: str, why: str) -> None:
        """This key cannot be carried over."""
        self.refused.append(f"{key}: {why}")

    def given(self, key: str, default: Any = None) -> Any:
        """What is set there, or what it means there when it is not."""
        value = self.raw.get(key)
        return default if value is None else value


Rule = Callable[[Draft, str, Any], None]


def to(path: str) -> Rule:
    """The same under another name."""
    return lambda draft, _, value: draft.set(path, value)


def words(path: str, known: Mapping[object, Any]) -> Rule:
    """One of some words, each with its own here; any other is refused."""

    def carry(draft: Draft, key: str, value: Any) -> None:
        if isinstance(value, bool | int | str) and value in known:
            draft.set(path, known[value])
        else:
            draft.refuse(key, f"{value!r} has no counterpart ({', '.join(str(word) for word in known)} have)")

    return carry


def only(*values: Any, why: str) -> Rule:
    """These values ask for nothing but what is done here anyway; any other is refused."""

    def carry(draft: Draft, key: str, value: Any) -> None:
        if value not in values:
            draft.refuse(key, f"{value!r}: {why}")

    return carry


def noted(why: str) -> Rule:
    """Carried over with a difference, or not at all, without a change to what is learned."""
    return lambda draft, key, value: draft.note(f"{key}: {value}: {why}")


def passed(_draft: Draft, _key: str, _value: Any) -> None:
    """Decides where things are kept, shown or cached, or how fast it goes: nothing that a job has to say."""


def elsewhere(_draft: Draft, _key: str, _value: Any) -> None:
    """Read together with other keys, once all are known."""


def held_out(draft: Draft, key: str, value: Any) -> None:
    """A share of the rows; their number has no counterpart."""
    if isinstance(value, int | float) and 0 <= value < 1:
        draft.set("dataset.validation.share", value)
    else:
        draft.refuse(key, f"{value!r} is a number of rows; here a share below 1 is held out, or a source of its own")


def sharding(draft: Draft, key: str, value: Any) -> None:
    """A DeepSpeed configuration by its name: `deepspeed_configs/zero2.json`, `ds_z3_config.json`."""
    stage = re.search(r"z(?:ero_?)?([0-3])(?![0-9])", Path(str(value)).name.lower())
    if stage is None:
        draft.refuse(key, f"{value!r} names no ZeRO stage")
    elif stage[1] == "3":
        draft.shards = True
    else:
        draft.note(f"{key}: {value}: each worker keeps the whole model (ddp); fsdp2 shards it")


def uri_of(path: str) -> str:
    """A file or URI as it is; `org/name`, unless it is a file by its ending, is the hub's."""
    if _HUB_ID.fullmatch(path) and not path.endswith(_FILE_ENDINGS):
        return f"hf://{path}"
    return path


def batch(draft: Draft, micro: int, accumulation: int, workers: int) -> None:
    """Rows a step, and over all workers: the same mathematics with any number of them."""
    if not all(isinstance(part, int) for part in (micro, accumulation, workers)):
        draft.refuse("batch size", f"{micro!r} × {accumulation!r} × {workers!r} are no whole numbers")
        return
    draft.set("hyperparameters.batchSize", micro)
    draft.set("hyperparameters.globalBatchSize", micro * accumulation * workers)
    draft.set("distributed.workers", workers)
    _shard(draft, workers)
    if workers == 1:
        draft.note("globalBatchSize is that of one device; on N devices they trained with N times as many rows")


def _shard(draft: Draft, workers: int) -> None:
    """After the method is known, and the number of workers: neither one device nor quantized weights are sharded."""
    if draft.shards and workers > 1 and draft.spec.get("method") != "qlora":
        draft.set("distributed.strategy", "fsdp2")
    elif draft.shards:
        draft.note("sharded weights: whole on each worker here (ddp); fsdp2 is of several workers and no quantization")


def converted(
    raw: Mapping[str, Any],
    folder: Path,
    table: Mapping[str, Rule],
    finish: Callable[[Draft], None],
    drop: Collection[str],
) -> Draft:
    """Every key by its rule, then what several say together. Keys in `drop` are left out, and noted."""
    draft = Draft({key: value for key, value in raw.items() if key not in drop}, folder)
    for key in drop:
        draft.note(f"{key}: {raw.get(key)}: left out, as asked")
    for key, value in draft.raw.items():
        if value is None:
            continue
        rule = table.get(key)
        if rule is None:
            draft.refuse(key, "has no counterpart in a job")
        else:
            rule(draft, key, value)
    finish(draft)
    return draft


def read_foreign(file: Path, drop: Collection[str] = ()) -> tuple[FineTuningJob, list[str]]:
    """The job that another trainer's configuration asks for, and how it differs.

    Raises JobError naming every key that cannot be carried over.
    """
    from . import axolotl, llama_factory

    raw = read_parsed(file, JobError).raw
    if not isinstance(raw, Mapping):
        raise JobError(f"{file}: not a mapping of keys", field=str(file), remedy="give a configuration of a trainer")
    for key, trainer in (("base_model", axolotl), ("model_name_or_path", llama_factory)):
        if key in raw:
            draft = converted(raw, file.parent, trainer.TABLE, trainer.finish, drop)
            return _finished(draft, file), draft.notes
    raise JobError(
        f"{file}: neither axolotl's (base_model) nor LLaMA-Factory's (model_name_or_path)",
        field=str(file),
        remedy="name one of theirs, or start from a template: aim-trainer init",
    )


def _finished(draft: Draft, file: Path) -> FineTuningJob:
    if draft.refused:
        told = "".join(f"\n  {line}" for line in draft.refused)
        raise JobError(
            f"{file}: {len(draft.refused)} keys cannot be carried over:{told}\n",
            field=str(file),
            remedy="change them there, or leave them out with --drop KEY",
        )
    name = re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:47].rstrip("-")
    raw = {
        "apiVersion": API_VERSION,
        "kind": "FineTuningJob",
        "metadata": {"name": name if name[:1].isalpha() else f"job-{name}"[:47].rstrip("-")},
        "spec": draft.spec,
    }
    return check(FineTuningJob, raw, f"{file}, as a job", JobError)
