"""Examples become tokens: many texts in one call of the tokenizer, the mask out of the characters' places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from aim_trainer.errors import DataError, JobError
from aim_trainer.job.job import Spec
from aim_trainer.places.open import open_file

from .chat import Chat, Rendered, load_tokenizer
from .examples import Completion, Conversation, Example, Labelled
from .problems import Problems, RowProblem
from .read import Located
from .template import in_time
from .tokens import Row

#: Rows tokenised in one call: enough to keep the tokenizer's threads at work.
_TOGETHER = 256


@dataclass
class Counts:
    """Of over-long rows: dropped, truncated. untrained: left out because nothing was trained of what the cut left."""

    dropped: int = 0
    truncated: int = 0
    untrained: int = 0


class Encoded(NamedTuple):
    """rendered: what the tokens are of."""

    where: str
    row: Row
    rendered: Rendered


class Encoder:
    """Tokenises by a job's template and its rules for long rows."""

    def __init__(self, spec: Spec, tokenizer_dir: Path) -> None:
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self._template = spec.template
        self._max_tokens = spec.hyperparameters.max_seq_length
        self._over_long = spec.dataset.over_long
        self._all = spec.dataset.train_on == "all"
        # A chat template writes its own special tokens; other texts get the tokenizer's.
        self._chat = None
        if spec.template in ("chat", "summarization"):
            self._chat = Chat(self.tokenizer, _text(spec.dataset.chat_template), spec.dataset.train_on)
        self._eos = self.tokenizer.eos_token_id
        if spec.template == "code" and self._eos is None:
            raise JobError(
                "the base model's tokenizer has no end token, which template code needs", field="spec.template"
            )

    @property
    def template_text(self) -> str | None:
        """What is rendered by; None of plain texts."""
        return None if self._chat is None else self._chat.template

    @property
    def mask_way(self) -> str:
        """How it is known what is trained: trl, marked, prefixes; plain of texts without a chat template."""
        return "plain" if self._chat is None else self._chat.way

    def __call__(self, examples: Iterable[Located], problems: Problems, counts: Counts) -> Iterator[Encoded]:
        """Rows of at most max_seq_length tokens, in order; what cannot be trained on goes to problems."""
        rest = iter(examples)
        while together := list(islice(rest, _TOGETHER)):
            yield from self._batch(together, problems, counts)

    def _batch(self, together: list[Located], problems: Problems, counts: Counts) -> Iterator[Encoded]:
        rendered: list[tuple[Located, Rendered]] = []
        with in_time():
            for located in together:
                try:
                    rendered.append((located, self._render(located.example)))
                except RowProblem as problem:
                    problems.add(located.where, str(problem))
        encodings = self._encodings([text.text for _, text in rendered])
        for (located, text), encoding in zip(rendered, encodings, strict=True):
            try:
                row = self._row(located.example, text, encoding, counts)
            except RowProblem as problem:
                problems.add(located.where, str(problem))
                continue
            if row is not None:
                yield Encoded(located.where, row, text)

    def _render(self, example: Example) -> Rendered:
        if self._chat is not None:
            return self._chat(cast(Conversation, example))
        if isinstance(example, Labelled):
            return Rendered(example.text, [], [])
        prompt, completion = cast(Completion, example)
        text = prompt + completion
        return Rendered(text, [(0 if self._all else len(prompt), len(text))], [])

    def _encodings(self, texts: list[str]) -> list[Any]:
        encodings: list[Any] = self.tokenizer.backend_tokenizer.encode_batch(
            texts, add_special_tokens=self._chat is None
        )
        return encodings

    def _row(self, example: Example, rendered: Rendered, encoding: Any, counts: Counts) -> Row | None:
        """None: left out, and counted."""
        tokens = np.asarray(encoding.ids, np.int32)
        trained = mask(encoding, rendered.spans)
        if self._template == "code":
            tokens, trained = _ended(tokens, trained, self._eos)
        for prefix in rendered.prefixes:
            ids = self._encodings([prefix])[0].ids
            if tokens[: len(ids)].tolist() != ids:
                raise RowProblem(
                    "messages",
                    "an answer's first token begins before the answer: what is trained is not what is served",
                )
        label = example.label if isinstance(example, Labelled) else None
        if label is None and not trained.any():
            raise RowProblem("", "the chat template shows nothing that is trained of this row")
        return self._fitting(Row(tokens, trained, label), counts)

    def _fitting(self, row: Row, counts: Counts) -> Row | None:
        length, most = len(row.tokens), self._max_tokens
        if length <= most:
            return row
        if self._over_long == "refuse":
            raise RowProblem(
                "",
                f"{length:,} tokens, hyperparameters.maxSeqLength is {most:,}; raise it, or set dataset.overLong "
                "to drop or truncate",
            )
        if self._over_long == "drop":
            counts.dropped += 1
            return None
        if row.label is None and not row.trained[1:most].any():
            counts.untrained += 1
            return None
        counts.truncated += 1
        return Row(row.tokens[:most], row.trained[:most], row.label)


def mask(encoding: Any, spans: list[tuple[int, int]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """1 for each token that stands for a character of a span: (n,)."""
    trained = np.zeros(len(encoding.ids), np.uint8)
    for begin, end in spans:
        first = _token_at(encoding, range(begin, end))
        last = _token_at(encoding, range(end - 1, begin - 1, -1))
        if first is not None and last is not None:
            trained[first : last + 1] = 1
    return trained


def _token_at(encoding: Any, places: range) -> int | None:
    """Of the first of the places that a token stands for: some tokenizers drop white space."""
    for place in places:
        token: int | None = encoding.char_to_token(place)
        if token is not None:
            return token
    return None


def _ended(tokens: Any, trained: Any, end: int) -> tuple[Any, Any]:
    if len(tokens) and tokens[-1] == end:
        trained[-1] = 1
        return tokens, trained
    return np.append(tokens, np.int32(end)), np.append(trained, np.uint8(1))


def _text(uri: str | None) -> str | None:
    if uri is None:
        return None
    place, name = open_file(uri)
    try:
        return place.read_bytes(name).decode()
    except UnicodeDecodeError as problem:
        raise DataError(
            f"spec.dataset.chatTemplate: {uri}: no UTF-8: {problem}", field="dataset.chatTemplate"
        ) from None
