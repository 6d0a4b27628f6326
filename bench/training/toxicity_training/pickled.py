"""The words of a Keras tokenizer, out of its pickle, without running anything that the pickle names."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from typing import Any


class Refused(pickle.UnpicklingError):
    """The pickle asks for more than a tokenizer is made of."""


class _Tokenizer:
    """Stands for Keras' class: takes its state and does nothing."""


_ALLOWED: dict[tuple[str, str], type] = {
    ("keras.src.legacy.preprocessing.text", "Tokenizer"): _Tokenizer,
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "int"): int,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise Refused(f"the pickle asks for {module}.{name}: not a tokenizer")
        return _ALLOWED[module, name]


def words(raw: bytes) -> list[str]:
    """The words the model knows, by rank: the first has token 1.

    Raises:
        pickle.UnpicklingError: not a pickle, or one that asks for something else.
        ValueError: the tokenizer works otherwise than ours (`detectors/toxicity/words.py`).
    """
    tokenizer = _Restricted(io.BytesIO(raw)).load()
    state = vars(tokenizer)
    expected = {"split": " ", "lower": True, "char_level": False, "oov_token": None, "analyzer": None}
    for name, value in expected.items():
        if state.get(name) != value:
            raise ValueError(f"the tokenizer's {name} is {state.get(name)!r}, not {value!r}")
    if state["filters"] != '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n':
        raise ValueError("the tokenizer's filters are not Keras' own")
    by_rank = sorted(state["word_index"].items(), key=lambda item: item[1])[: state["num_words"] - 1]
    if [rank for _, rank in by_rank] != list(range(1, len(by_rank) + 1)):
        raise ValueError("the tokenizer's ranks have gaps")
    return [word for word, _ in by_rank]
