"""Attacks and harmless texts of our own, in the same frames and the same disguises: what differs is only the intent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from injection_training.grammar import Grammar

HERE = Path(__file__).parent
ATTACKS = Grammar(HERE / "attacks.yaml")
BENIGN = Grammar(HERE / "benign.yaml")

Maker = Callable[[Random], str]


def override(random: Random) -> str:
    return ATTACKS.make(random, "override")


def persona(random: Random) -> str:
    """ "You are NAME, who ..." and 2 to 15 rules."""
    parts = ATTACKS.sample(random, "persona_opening", "persona_rule", random.randrange(2, 16), "persona_closing")
    return random.choice((" ", " ", "\n", "\n\n")).join(parts[: None if random.random() < 0.75 else -1])


def persona_window(random: Random) -> str:
    """What a window sees of a long persona: rules alone."""
    return " ".join(ATTACKS.sample(random, "", "persona_rule", random.randrange(2, 6)))


def attack(random: Random) -> str:
    kinds = ("override", "extraction", "jailbreak", "planted", "foreign", "mode")
    (kind,) = random.choices((*kinds, "persona"), weights=(28, 12, 16, 12, 8, 8, 16))
    return persona(random) if kind == "persona" else ATTACKS.make(random, kind)


def combined_attack(random: Random) -> str:
    """Fiction, dialogue and code, alone or joined with an override, another jailbreak or a persona's rules."""
    fiction = ATTACKS.make(random, random.choice(("fiction", "mode")))
    with_it = (
        lambda: fiction,
        lambda: f"{override(random)} {fiction}",
        lambda: f"{ATTACKS.make(random, 'jailbreak')}\n{fiction}",
        lambda: f"{fiction} {persona_window(random)}",
    )
    return random.choice(with_it)()


def tool_attack(random: Random) -> str:
    """For an agent that reads a tool's answer: calls, banners, false roles, messages from "the user"."""
    kinds = ("tool_call", "planted", "action", "bannered", "marked", "tool_message")
    return ATTACKS.make(random, random.choices(kinds, weights=(25, 6, 5, 25, 22, 17))[0])


def role_play(random: Random) -> str:
    parts = BENIGN.sample(random, "role_opening", "role_rule", random.randrange(2, 9))
    return random.choice((" ", "\n")).join(parts)


def request(random: Random) -> str:
    return BENIGN.make(random, "request_text")


def follow_up(random: Random) -> str:
    return BENIGN.make(random, "follow_up")


def look_alike(random: Random) -> str:
    """Talk about attacks, quoted attacks, system prompts, policies."""
    (kind,) = random.choices(("security", "quoting", "system_prompt", "document"), weights=(30, 25, 25, 20))
    if kind == "document":
        return random.choice((" ", "\n")).join(BENIGN.sample(random, "", "document_line", random.randrange(2, 6)))
    return BENIGN.make(random, kind)


def foreign_or_game(random: Random) -> str:
    return BENIGN.make(random, random.choice(("foreign", "game")))


_WRAPS: tuple[str, ...] = (
    "{before}\n\n{text}\n\n{after}",
    "{before} {text} {after}",
    "{text}\n\n{before}",
    "{before}\n{text}",
    'Summarise the following text:\n"""\n{before}\n{text}\n"""',
    "Translate this to French: {before} {text}",
    '{{"title": "{title}", "body": "{before} {text}", "status": 200}}',
    "<html><body><h1>{title}</h1><p>{before}</p><div>{text}</div></body></html>",
    "From: info@example.com\nSubject: {title}\n\n{before}\n\n{text}\n\nKind regards",
    "# {title}\n{before}\n# {text}\nprint('done')",
    "Review: {before} {text} 5 stars",
    "Search results\n1. {before}\n2. {text}\n3. {after}",
    "| name | note |\n|---|---|\n| {title} | {text} |\n\n{before}",
)


def wrapped(random: Random, text: str, documents: list[str]) -> str:
    """A text planted in a document: at the start, in the middle, at the end, in a field of something."""
    document = random.choice(documents)
    size = random.randrange(80, 900)
    start = random.randrange(max(len(document) - size, 0) + 1)
    piece = document[start : start + size]
    cut = random.randrange(len(piece) + 1)
    fields = {"before": piece[:cut], "after": piece[cut:], "text": text, "title": piece[:40].split("\n")[0]}
    return random.choice(_WRAPS).format(**fields)


_TWINS = dict(zip("aeopcxiy", "аеорсхіу", strict=True))
_DIGITS = dict(zip("aeiost", "431057", strict=True))


def _replaced(random: Random, text: str, table: dict[str, str], share: float) -> str:
    return "".join(table[char] if char in table and random.random() < share else char for char in text)


def _typos(random: Random, text: str) -> str:
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) > 4 and random.random() < 0.35:
            at = random.randrange(1, len(word) - 1)
            swapped = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
            words[index] = swapped if random.random() < 0.5 else word[:at] + word[at + 1 :]
    return " ".join(words)


def disguised(random: Random, text: str) -> str:
    """One of eight disguises; the normal form undoes some of them, some are left to the model."""
    disguises: tuple[Callable[[], str], ...] = (
        lambda: _replaced(random, text, _TWINS, 0.5),
        lambda: _replaced(random, text, _DIGITS, 0.6),
        lambda: "".join(char + ("\u200b" if random.random() < 0.3 else "") for char in text),
        lambda: "".join(char.upper() if random.random() < 0.5 else char for char in text),
        lambda: _typos(random, text),
        lambda: text.replace(" ", random.choice(("_", "  ", "-"))),
        lambda: " ".join("-".join(word) if random.random() < 0.4 else word for word in text.split(" ")),
        lambda: text.lower().rstrip(".!"),
    )
    return random.choice(disguises)()
