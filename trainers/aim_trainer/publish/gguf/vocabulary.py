"""A byte-level BPE tokenizer as llama.cpp has it: tokens, types, merges and the name of how it splits text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from aim_trainer.errors import JobError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How tokenizer.json splits text before its merges → llama.cpp's name of the same (src/llama-vocab.cpp).
_SPLITS: Mapping[tuple[str, ...], str] = {
    ("ByteLevel:regex",): "gpt-2",
    ("Digits:individual", "ByteLevel:regex"): "smollm",
    (f"Split:{_LLAMA3}", "ByteLevel"): "llama-bpe",
    (f"Split:{_QWEN2}", "ByteLevel"): "qwen2",
    (f"Split:{_TEKKEN}", "ByteLevel"): "tekken",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens and types: (vocabulary size,), in the order of ids; merges: `a b`, best first; split: llama.cpp's name."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    split: str


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """Of a directory's tokenizer.json; size: rows of the embedding, the ids above the tokenizer's own being unused.

    Raises JobError: a tokenizer that llama.cpp would cut text differently with.
    """
    file = directory / "tokenizer.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    model = raw["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refused(f"its tokenizer is {model['type']}, not byte-level BPE", model["type"])
    split = _SPLITS.get(_splitting(raw.get("pre_tokenizer")))
    if split is None or raw.get("normalizer"):
        raise _refused("how its tokenizer splits text has no name in llama.cpp that is known here", str(file))
    tokens, types = _tokens(model["vocab"], raw["added_tokens"], size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(tokens, types, merges, split)


def _tokens(vocab: Mapping[str, int], added: list[Mapping[str, Any]], size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, number in vocab.items():
        tokens[number], types[number] = text, int(TokenType.NORMAL)
    for token in added:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        number = int(token["id"])
        tokens[number], types[number] = str(token["content"]), int(kind)
    return tokens, types


def _splitting(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Each step in a word; equal words split equally."""
    if pre_tokenizer is None:
        return ()
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    return tuple(_step(step) for step in steps)


def _step(step: Mapping[str, Any]) -> str:
    kind = str(step["type"])
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel:regex" if step.get("use_regex", True) else "ByteLevel"
    if kind == "Digits":
        return f"Digits:{'individual' if step.get('individual_digits') else 'together'}"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return f"Split:{step['pattern'].get('Regex')}"
    return f"{kind}:?"


def _refused(why: str, value: object) -> JobError:
    return JobError(
        f"spec.output.gguf: {why}: llama.cpp would read other tokens than the model was trained on",
        field="spec.output.gguf",
        value=value,
        remedy="set output.gguf: false and serve the published weights with vLLM",
    )
