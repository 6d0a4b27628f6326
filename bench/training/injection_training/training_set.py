"""The training set and the validation set, from the packages and the grammars. Every kind has a seed of its own, so
that one can be changed without another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from injection_training import corpora, synthetic
from injection_training.archives import Archives
from injection_training.corpora import Example
from injection_training.synthetic import Maker

SEED = 20
LONG_CHARS = 6000
_CHUNK_CHARS = (120, 700)

#: Texts of each kind in training; validation has a tenth.
_ATTACKS: dict[str, tuple[Maker, int]] = {
    "attack": (synthetic.attack, 6000),
    "persona": (synthetic.persona, 1500),
    "persona window": (synthetic.persona_window, 2200),
    "combined": (synthetic.combined_attack, 2400),
    "tool": (synthetic.tool_attack, 2800),
}
_BENIGN: dict[str, tuple[Maker, int]] = {
    "request": (synthetic.request, 3500),
    "role play": (synthetic.role_play, 1800),
    "look-alike": (synthetic.look_alike, 4500),
    "follow-up": (synthetic.follow_up, 4000),
    "foreign": (synthetic.foreign_or_game, 900),
}
_WRAPPED_ATTACKS, _WRAPPED_BENIGN = 8500, 7000
_DISGUISED_ATTACKS, _DISGUISED_BENIGN = 1800, 1400
_JOINED = 900


def training(archives: Archives) -> list[Example]:
    """Everything, without duplicates and without what stands in a test split."""
    return _distinct(archives, [*_corpora(archives, True), *_made(archives, True)])


def validation(archives: Archives) -> list[Example]:
    """Sources that are not in training; what the grammars make is of other seeds only, and easier for it."""
    return _distinct(archives, [*_corpora(archives, False), *_made(archives, False), *long_documents(archives, False)])


def long_documents(archives: Archives, training: bool) -> list[Example]:
    """Whole documents, cut at 6,000 characters: for mining, and as a group of their own."""
    found = corpora.documents(archives, training)
    return [example._replace(text=example.text[:LONG_CHARS], kind="long documents") for example in found]


def harmless(count: int) -> Iterator[str]:
    """Newly made harmless texts for mining, `count` times the usual shares."""
    for kind, (make, size) in _BENIGN.items():
        random = Random(f"{SEED} mining {kind}")
        yield from (make(random) for _ in range(count * size))


def follow_ups(count: int) -> Iterator[str]:
    """Newly made commands of a running chat."""
    random = Random(f"{SEED} follow-ups")
    return (synthetic.follow_up(random) for _ in range(count))


def _corpora(archives: Archives, training: bool) -> Iterator[Example]:
    split = "train" if training else "validation"
    yield from corpora.slabs(archives, split)
    yield from corpora.neuralchemy(archives, split)
    yield from corpora.yanismiraoui(archives, training)
    yield from corpora.chat(archives, training, 3000 if training else 800)
    yield from corpora.tasks(archives, training)
    random = Random(f"{SEED} chunks {training}")
    for example in (*corpora.prompts(archives, training), *corpora.docstring_texts(archives, training)):
        yield example._replace(text=_chunk(random, example.text))
    for example in corpora.documents(archives, training):
        for _ in range(2):
            yield example._replace(text=_chunk(random, example.text))


def _chunk(random: Random, text: str) -> str:
    size = random.randrange(*_CHUNK_CHARS)
    start = random.randrange(max(len(text) - size, 0) + 1)
    return text[start : start + size]


def _made(archives: Archives, training: bool) -> Iterator[Example]:
    share = 1 if training else 10
    random = Random(f"{SEED} made {training}")
    papers = [example.text for example in corpora.documents(archives, training)]
    attacks = list(_simple(_ATTACKS, share, training))
    harmless = list(_simple(_BENIGN, share, training))
    yield from (Example(text, True, f"our {kind}") for text, kind in attacks)
    yield from (Example(text, False, "frames") for text, _ in harmless)
    for source, attack in ((attacks, True), (harmless, False)):
        wraps, disguises = (_WRAPPED_ATTACKS, _DISGUISED_ATTACKS) if attack else (_WRAPPED_BENIGN, _DISGUISED_BENIGN)
        for _ in range(wraps // share):
            yield Example(synthetic.wrapped(random, _short(random, source), papers), attack, "wrapped")
        for _ in range(disguises // share):
            yield Example(synthetic.disguised(random, _short(random, source)), attack, "disguised")
        for _ in range(_JOINED // share):
            parts = [_short(random, source), _short(random, harmless)]
            random.shuffle(parts)
            yield Example(random.choice((" ", "\n\n")).join(parts), attack, "joined")


def _short(random: Random, texts: list[tuple[str, str]]) -> str:
    return random.choice(texts)[0][:600]


def _simple(kinds: dict[str, tuple[Maker, int]], share: int, training: bool) -> Iterator[tuple[str, str]]:
    for kind, (make, count) in kinds.items():
        random = Random(f"{SEED} {kind} {training}")
        yield from ((make(random), kind) for _ in range(count // share))


def _distinct(archives: Archives, examples: list[Example]) -> list[Example]:
    """The first of those whose letters are the same, but none of the test splits'."""
    tested = {_letters(e.text) for read in (corpora.slabs, corpora.neuralchemy) for e in read(archives, "test")}
    seen: dict[str, Example] = {}
    for example in examples:
        seen.setdefault(_letters(example.text), example)
    return [example for letters, example in seen.items() if letters not in tested]


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()
