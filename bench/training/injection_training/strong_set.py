"""What the encoder is trained on: the linear model's training set, without most of what that model finds easy."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from random import Random

from aim_guardrail.detectors.injection import model as shipped
from aim_guardrail.detectors.injection.encoder import WINDOW_TOKENS
from aim_guardrail.detectors.injection.linear import Linear
from aim_guardrail.detectors.injection.normalise import normal
from aim_guardrail.detectors.onnx.windows import TokenizerWindows
from injection_training import training_set
from injection_training.archives import Archives
from injection_training.encoder import CLS, SEP
from injection_training.fit import hard_windows
from injection_training.tune import Row

_SEED = 4
_EASY_LOGIT = 4.5  # on the right side by as much: easy
#: Shares that are drawn: of what people wrote and of what is made, and of what is easy in both.
_CORPORA = frozenset({"slabs", "neuralchemy", "languages"})
_MADE_SHARE, _EASY_CORPORA_SHARE, _EASY_MADE_SHARE = 0.25, 0.6, 0.35
_HARD_LOGIT = -2.5
_MINED = 3_000
_SEARCHED = 2_500  # of windows, and of texts
_AGAIN_SHARE, _AGAIN_FOLLOW_UPS = 0.25, 1_000


def first(archives: Archives, linear: Linear) -> list[Row]:
    """Texts of the corpora, and a part of what is made; of both, most of what the linear model finds hard."""
    random = Random(_SEED)
    rows = []
    for example in training_set.training(archives):
        is_corpus = example.kind in _CORPORA
        if not is_corpus and random.random() > _MADE_SHARE:
            continue
        text = normal(example.text)
        logit = linear.logit(text)
        is_easy = (logit if example.attack else -logit) > _EASY_LOGIT
        if not is_easy or random.random() < (_EASY_CORPORA_SHARE if is_corpus else _EASY_MADE_SHARE):
            rows.append(_row(linear, text, example.attack))
    return rows + _mined(archives, linear)


def _mined(archives: Archives, linear: Linear) -> list[Row]:
    """Harmless windows and texts that the linear model suspects, evenly drawn."""
    papers = (normal(each.text) for each in training_set.long_documents(archives, training=True)[::3])
    texts = [text for text in map(normal, [*training_set.harmless(1)][::2]) if linear.logit(text) > _HARD_LOGIT]
    found = [*hard_windows(linear, papers), *texts]
    Random(_SEED).shuffle(found)
    return [_row(linear, text, False) for text in found[:_MINED]]


def unlabelled(archives: Archives) -> list[list[int]]:
    """Harmless windows of documents, and new harmless texts, for the encoder to search."""
    random = Random(_SEED)
    papers = [normal(each.text) for each in training_set.long_documents(archives, training=True)[1::3]]
    found = [ids for text in papers for ids in _windows(text)]
    random.shuffle(found)
    texts = random.sample(list(training_set.harmless(1)), _SEARCHED)
    return found[:_SEARCHED] + [_windows(normal(text))[0] for text in texts]


def second(linear: Linear, rows: list[Row], suspected: Iterable[Row]) -> list[Row]:
    """What the encoder suspects, follow-ups of a running chat, and a part of the first set."""
    random = Random(_SEED)
    again = random.sample(rows, int(_AGAIN_SHARE * len(rows)))
    follow_ups = [_row(linear, normal(text), False) for text in training_set.follow_ups(_AGAIN_FOLLOW_UPS)]
    return [*again, *follow_ups, *suspected]


def _row(linear: Linear, text: str, attack: bool) -> Row:
    """Cut where the linear model finds it worst: an attack in a long text would else be cut off."""
    ((start, end),) = linear.spots(text, floor=0.0, most=1)
    return Row(_windows(text[start:end])[0], attack)


def _windows(text: str) -> list[list[int]]:
    """Token ids of each window, the ends marked; one of nothing else, where there is no token."""
    return [window.ids.tolist() for window in _tokenizer().windows(text)] or [[CLS, SEP]]


@functools.cache
def _tokenizer() -> TokenizerWindows:
    return TokenizerWindows(Path(shipped.__file__).parent / "tokenizer.json", WINDOW_TOKENS)
