"""The rows of a job become tokens on disk: validated, divided, tokenised once, found again by digest."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aim_trainer.errors import DataError, JobError
from aim_trainer.files import sha256_of
from aim_trainer.job.job import FineTuningJob, Spec

from .encode import Counts, Encoder
from .problems import Problems
from .read import Reader
from .statistics import SourceRead, Statistics, lengths
from .survey import Survey, Surveyed, chosen, survey
from .tokens import Row, Tokens, write_about, write_tokens

#: Counts up when the same input would give other tokens or masks than before.
_VERSION = 1
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Prepared:
    """train, validation: directories of `data.tokens`. digest: of all that decides the tokens."""

    train: Path
    validation: Path | None
    statistics: Statistics
    digest: str


def prepare(job: FineTuningJob, tokenizer_dir: Path, into: Path) -> Prepared:
    """Tokenises what is not there yet under `into`. Raises DataError with all bad rows, before anything is written;
    JobError for a template or tokenizer that cannot be used; StoreError where a place is away.
    """
    spec = job.spec
    if spec.template == "classification" and spec.dataset.packing:
        raise JobError("spec.dataset.packing: a classification reads one text at a time", field="spec.dataset.packing")
    surveyed = survey(spec)
    encoder = Encoder(spec, tokenizer_dir)
    digest = _digest(spec, surveyed, encoder, tokenizer_dir)
    train, validation = into / "train" / digest, into / "validation" / digest
    if not (_is_whole(train) and _is_whole(validation)):
        _write(spec, surveyed, encoder, train, validation)
    statistics = Statistics.of_json(Tokens(train).about["statistics"])
    return Prepared(train, validation if statistics.validation_rows else None, statistics, digest)


def _write(spec: Spec, surveyed: Survey, encoder: Encoder, train: Path, validation: Path) -> None:
    """Both directories, each put in place as a whole: whoever else does the same at this moment writes the same."""
    problems, counts, held, pad = Problems(), Counts(), Counts(), encoder.tokenizer.pad_token_id
    about: dict[str, Any] = {"pad_token_id": encoder.tokenizer.eos_token_id if pad is None else pad}
    parts = [place.with_name(f"{place.name}.{uuid.uuid4().hex}.part") for place in (train, validation)]
    try:
        shares: list[tuple[int, float]] = []
        write_tokens(parts[0], _rows(spec, surveyed, encoder, problems, counts, shares), about)
        write_tokens(parts[1], _held(spec, surveyed, encoder, problems, held), about)
        problems.refuse()
        statistics = _statistics(spec, surveyed, encoder, (counts, held), Tokens(parts[0]), len(Tokens(parts[1])))
        _refuse_useless(spec, statistics)
        told = {"statistics": statistics.as_json(), "shares": shares}
        for part in parts:
            _seal(part, about | told)
        for part, place in zip(reversed(parts), (validation, train), strict=True):
            _put(part, place)
    finally:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)


def _rows(
    spec: Spec,
    surveyed: Survey,
    encoder: Encoder,
    problems: Problems,
    counts: Counts,
    shares: list[tuple[int, float]],
) -> Iterator[Row]:
    """Of all sources in their order; adds to shares how many came of each."""
    reader = Reader(spec)
    for one in surveyed.training:
        rows = 0
        for encoded in encoder(chosen(reader, one, one.kept), problems, counts):
            rows += 1
            yield encoded.row
        shares.append((rows, one.source.weight))


def _held(spec: Spec, surveyed: Survey, encoder: Encoder, problems: Problems, counts: Counts) -> Iterator[Row]:
    reader = Reader(spec)
    sources: list[Surveyed] = surveyed.training if surveyed.validation is None else [surveyed.validation]
    for one in sources:
        for encoded in encoder(chosen(reader, one, one.held), problems, counts):
            yield encoded.row


def _statistics(
    spec: Spec, surveyed: Survey, encoder: Encoder, both: tuple[Counts, Counts], tokens: Tokens, validation_rows: int
) -> Statistics:
    sources = surveyed.training + ([] if surveyed.validation is None else [surveyed.validation])
    counts, held = both
    return Statistics(
        rows=len(tokens),
        validation_rows=validation_rows,
        tokens=int(tokens.ends[-1]) if len(tokens) else 0,
        trained_tokens=tokens.trained_tokens(),
        lengths=lengths(tokens),
        masks=encoder.mask_way,
        dropped=counts.dropped,
        truncated=counts.truncated,
        untrained=counts.untrained,
        validation_dropped=held.dropped + held.untrained,
        validation_truncated=held.truncated,
        duplicates=surveyed.duplicates,
        duplicates_removed=spec.dataset.duplicates == "drop",
        held_out=surveyed.held_out,
        sources=[
            SourceRead(one.source.shown, one.seen.format, one.seen.rows, one.source.weight, sorted(one.seen.ignored))
            for one in sources
        ],
    )


def _refuse_useless(spec: Spec, statistics: Statistics) -> None:
    if not statistics.rows:
        raise DataError(
            f"no row is left to train on: {statistics.dropped:,} were dropped as longer than maxSeqLength "
            f"{spec.hyperparameters.max_seq_length:,}",
            field="spec.hyperparameters.maxSeqLength",
        )
    if spec.template == "classification":
        return
    if not statistics.trained_tokens:
        raise DataError("0 % of the tokens are trained: the chat template marks nothing", field="spec.dataset.trainOn")
    if statistics.trained_tokens == statistics.tokens and spec.dataset.train_on != "all":
        raise DataError(
            "100 % of the tokens are trained, though trainOn is "
            f"{spec.dataset.train_on}: the chat template marks questions as well, or there are none",
            field="spec.dataset.trainOn",
            remedy="set dataset.trainOn to all if that is what is wanted",
        )


def _digest(spec: Spec, surveyed: Survey, encoder: Encoder, tokenizer_dir: Path) -> str:
    """32 hex digits over what is said, and everything that decides how it becomes tokens and masks."""
    sources = surveyed.training + ([] if surveyed.validation is None else [surveyed.validation])
    decided = {
        "version": _VERSION,
        "said": [hashlib.sha256(one.hashes.tobytes()).hexdigest() for one in sources],
        "weights": [one.source.weight for one in sources],
        "tokenizer": tokenizer_digest(tokenizer_dir),
        "chat_template": encoder.template_text,
        "masks": encoder.mask_way,
        "template": spec.template,
        "max_seq_length": spec.hyperparameters.max_seq_length,
        "dataset": spec.dataset.model_dump(
            include={"train_on", "over_long", "duplicates", "system_prompt", "labels"}, mode="json"
        ),
        "validation": None if surveyed.validation else [spec.dataset.validation.share, spec.dataset.validation.seed],
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 over the files that make the tokenizer."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (directory / name).exists():
            digest.update(f"{name}\0".encode() + (directory / name).read_bytes())
    return digest.hexdigest()


def _seal(directory: Path, about: dict[str, Any]) -> None:
    """Writes `about.json` anew, with the digests of the other files."""
    files = {file.name: sha256_of(file) for file in sorted(directory.glob("*.bin"))}
    write_about(directory, about | {"files": files})


def _is_whole(directory: Path) -> bool:
    """Whether each file is what was written; what is damaged is taken away."""
    if not directory.exists():
        return False
    try:
        files = json.loads((directory / "about.json").read_bytes())["files"]
        if all(sha256_of(directory / name) == digest for name, digest in files.items()):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    return False


def _put(part: Path, place: Path) -> None:
    try:
        part.rename(place)
    except OSError:
        # Somebody else was first, with the same rows.
        if not _is_whole(place):
            part.rename(place)
