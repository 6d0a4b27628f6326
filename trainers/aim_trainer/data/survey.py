"""All rows of a job read once: what is wrong with them, who says the same, who is held out.

Keeps eight bytes of each row, and the line it is in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from aim_trainer.errors import DataError
from aim_trainer.job.dataset import Dataset, Source
from aim_trainer.job.job import Spec

from .examples import content_hash
from .problems import Problems
from .read import Located, Reader, Seen

Hashes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


@dataclass
class Surveyed:
    """Of one source: what it says, row by row. kept, held: which rows are trained on, and which are held out."""

    source: Source
    seen: Seen
    hashes: Hashes
    kept: Flags = field(default_factory=lambda: np.empty(0, np.bool_))
    held: Flags = field(default_factory=lambda: np.empty(0, np.bool_))


@dataclass
class Survey:
    """duplicates: rows that say what an earlier row of training says; held_out: training rows that the validation
    source has as well. validation: the source of its own, where the job names one.
    """

    training: list[Surveyed]
    validation: Surveyed | None = None
    duplicates: int = 0
    held_out: int = 0


def check(spec: Spec) -> list[Seen]:
    """What each source is, where nothing is wrong with any; holds nothing of a row. Raises DataError, StoreError."""
    if spec.dataset.duplicates == "refuse":
        found = survey(spec)
        return [one.seen for one in found.training + ([found.validation] if found.validation else [])]
    reader, problems, seen = Reader(spec), Problems(), []
    for source in [*spec.dataset.all_sources(), *_validation_source(spec.dataset)]:
        seen.append(Seen(source.shown))
        for _ in reader.examples(source, problems, seen[-1]):
            pass
    problems.refuse()
    return seen


def survey(spec: Spec) -> Survey:
    """Reads everything once. Raises DataError with all that is wrong; StoreError where a place is away."""
    reader, problems = Reader(spec), Problems()
    surveyed = [_read(reader, source, problems) for source in spec.dataset.all_sources()]
    validation = None
    for own in _validation_source(spec.dataset):
        validation = _read(reader, own, problems)
        validation.held = np.ones(len(validation.hashes), np.bool_)
    problems.refuse()
    result = Survey(surveyed, validation)
    _choose(result, spec.dataset)
    if spec.dataset.duplicates == "refuse" and result.duplicates:
        _refuse_duplicates(reader, surveyed, problems)
    if not any(one.kept.any() for one in surveyed):
        raise DataError("no row is left to train on: validation has them all", field="dataset.validation")
    return result


def chosen(reader: Reader, surveyed: Surveyed, flags: Flags) -> Iterator[Located]:
    """The rows that are flagged, read again. Raises DataError if the source says something else by now."""
    problems, seen = Problems(), Seen(surveyed.source.shown)
    rows = 0
    for located in reader.examples(surveyed.source, problems, seen):
        if rows < len(flags) and content_hash(located.example) == surveyed.hashes[rows]:
            if flags[rows]:
                yield located
            rows += 1
            continue
        problems.add(located.where, "the source has changed while it was read; run again")
        break
    if rows < len(flags) and not problems.count:
        problems.add(surveyed.source.shown, "the source has changed while it was read; run again")
    problems.refuse()


def _validation_source(dataset: Dataset) -> list[Source]:
    held = dataset.validation
    if held.source is None:
        return []
    return [Source.model_validate({"uri": held.source, "format": held.format, "columns": held.columns})]


def _read(reader: Reader, source: Source, problems: Problems) -> Surveyed:
    seen, hashes = Seen(source.shown), array("Q")
    for located in reader.examples(source, problems, seen):
        hashes.append(content_hash(located.example))
    return Surveyed(source, seen, np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64))


def _choose(result: Survey, dataset: Dataset) -> None:
    """Sets kept and held of each source, and the counts."""
    every = np.concatenate([one.hashes for one in result.training])
    first = np.zeros(len(every), np.bool_)
    first[np.unique(every, return_index=True)[1]] = True
    result.duplicates = int(len(every) - first.sum())
    if result.validation is not None:
        held = np.isin(every, result.validation.hashes)
        result.held_out = int(held.sum())
        kept = ~held
    else:
        held = held_out(every, dataset.validation.share, dataset.validation.seed)
        kept = ~held
        # A row that is held out is measured once, however often it is there.
        held &= first
    if dataset.duplicates == "drop":
        kept &= first
    begin = 0
    for one in result.training:
        end = begin + len(one.hashes)
        one.kept = kept[begin:end]
        one.held = held[begin:end] if result.validation is None else np.zeros(end - begin, np.bool_)
        begin = end


def held_out(hashes: Hashes, share: float, seed: int) -> Flags:
    """Which rows are held out: those whose salted content comes first, `share` of what is said at all, at least one
    thing of two. Whatever says the same is on the same side.
    """
    distinct = np.unique(hashes)
    if not share or len(distinct) < 2:
        return np.zeros(len(hashes), np.bool_)
    count = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    salted = _mixed(distinct ^ _mixed(np.asarray([seed % 2**64], np.uint64)))
    return np.isin(hashes, distinct[np.argsort(salted)[:count]])


def _mixed(values: Hashes) -> Hashes:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): a permutation of 64 bits with no order left."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _refuse_duplicates(reader: Reader, surveyed: list[Surveyed], problems: Problems) -> None:
    """Names each duplicate and the row it repeats, in a reading of its own."""
    places: dict[int, str] = {}
    for one in surveyed:
        for located in reader.examples(one.source, problems, Seen(one.source.shown)):
            said = content_hash(located.example)
            if said in places:
                problems.add(located.where, f"says what {places[said]} says; set dataset.duplicates to keep or drop")
            places.setdefault(said, located.where)
    problems.refuse()
