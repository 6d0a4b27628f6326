"""Logistic regression on hashed n-grams, hard negatives mined with the model itself, weights cut to signed bytes.

One thread, fixed seeds and no BLAS in the path: the same packages give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray
from sklearn.linear_model import SGDClassifier

from aim_guardrail.detectors.injection.linear import Linear
from aim_guardrail.detectors.injection.ngrams import BUCKETS, NGrams, char_ngrams, word_ngrams

TRAINING_CHARS = 1200  # of each text
ALPHA = 4e-6
EPOCHS = 12
ROUNDS = 3
_HARD_LOGIT = -2.5  # a harmless window above it is hard
_WINDOWS = 3  # of each long document and round
_CLIP_QUANTILE = 0.9999
_BYTE = 127


class Labelled(NamedTuple):
    """A text in normal form, 1 for an attack, and how much it counts."""

    text: str
    label: int
    weight: float


def fit(examples: Sequence[Labelled], papers: Sequence[str], harmless: Sequence[str]) -> Linear:
    """A model of the examples. `papers` (long, window by window) and `harmless` (whole) are searched for hard negatives
    with each model, and the next one is trained on these too.
    """
    rows = features([example.text[:TRAINING_CHARS] for example in examples])
    labels = np.array([example.label for example in examples])
    weights = np.array([example.weight for example in examples])
    candidates, known = features([text[:TRAINING_CHARS] for text in harmless]), set[str]()
    model = _fitted(rows, labels, weights)
    for _ in range(ROUNDS):
        windows = [window for window in hard_windows(model, papers) if window not in known]
        known.update(windows)
        hard = _logits(model, candidates) > _HARD_LOGIT
        rows = sparse.vstack([rows, features(windows), candidates[hard]]).tocsr()
        candidates = candidates[~hard]
        new = rows.shape[0] - len(labels)
        labels, weights = np.append(labels, np.zeros(new, labels.dtype)), np.append(weights, np.ones(new))
        model = _fitted(rows, labels, weights)
    return model


def features(texts: Iterable[str]) -> sparse.csr_matrix:
    """One row a text: how often each n-gram stands in it, over the square root of the number of all of its kind."""
    columns, values, ends = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [0]
    for text in texts:
        for first, ngrams in ((0, char_ngrams(text)), (BUCKETS, word_ngrams(text))):
            buckets, counts = _counted(ngrams)
            columns.append((buckets + first).astype(np.int32))
            values.append((counts / np.sqrt(max(counts.sum(), 1))).astype(np.float32))
        ends.append(ends[-1] + len(columns[-1]) + len(columns[-2]))
    shape = (len(ends) - 1, 2 * BUCKETS)
    return sparse.csr_matrix((np.concatenate(values), np.concatenate(columns), ends), shape=shape)


def _counted(ngrams: Iterator[NGrams]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    buckets = [each.buckets for each in ngrams]
    return np.unique(np.concatenate(buckets), return_counts=True) if buckets else (np.zeros(0, np.int64),) * 2


def _fitted(rows: sparse.csr_matrix, labels: NDArray[np.int64], weights: NDArray[np.float64]) -> Linear:
    classifier = SGDClassifier(
        loss="log_loss", alpha=ALPHA, max_iter=EPOCHS, tol=None, average=True, random_state=0, n_jobs=1
    )
    classifier.fit(rows, labels, sample_weight=weights)
    learnt = classifier.coef_[0].astype(np.float64)
    chars, char_scale = _bytes(learnt[:BUCKETS])
    words, word_scale = _bytes(learnt[BUCKETS:])
    return Linear(chars, words, char_scale, word_scale, float(classifier.intercept_[0]))


def _bytes(weights: NDArray[np.float64]) -> tuple[NDArray[np.int8], float]:
    scale = float(np.quantile(np.abs(weights[weights != 0]), _CLIP_QUANTILE)) / _BYTE
    return np.clip(np.rint(weights / scale), -_BYTE, _BYTE).astype(np.int8), scale


def _logits(model: Linear, rows: sparse.csr_matrix) -> NDArray[np.float64]:
    weights = np.concatenate((model.chars * model.char_scale, model.words * model.word_scale))
    logits: NDArray[np.float64] = rows @ weights + model.bias
    return logits


def hard_windows(model: Linear, texts: Iterable[str]) -> Iterator[str]:
    """The worst windows of each long text, each once."""
    found: dict[str, None] = {}
    for text in texts:
        for part in model.windows(text):
            for at in np.argsort(-part.logits, kind="stable")[:_WINDOWS]:
                if part.logits[at] > _HARD_LOGIT:
                    found[text[part.starts[at] : part.ends[at]][:TRAINING_CHARS]] = None
    return iter(found)
