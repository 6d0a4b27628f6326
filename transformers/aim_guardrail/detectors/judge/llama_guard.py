"""Llama Guard 2 and 3: prompts and answers, as Meta's model cards and the models' own chat templates have them.

One question to a conversation; the answer is `safe`, or `unsafe` and on the next line the codes of its categories. The
score is P(unsafe) by the token that says so, as the cards say.
Sources: https://www.llama.com/docs/model-cards-and-prompt-formats/llama-guard-3/, …/meta-llama-guard-2/, the
`chat_template` of each model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aim_guardrail.detectors.judge.backend import Part, Prompt, Question, Said, Unreadable
from aim_guardrail.detectors.judge.conversation import Turn
from aim_guardrail.detectors.judge.probability import probability

UNSAFE = "UNSAFE"
"""The label of what the judge calls safe: how likely it is that it is not."""

_MAX_TOKENS = 64  # all fourteen codes
_WORDS = ("unsafe", "safe")
_ANSWER = re.compile(
    r"\s*(?:(safe)|(unsafe)[ \t]*\n\s*(S\d{1,2}(?:[ \t]*[,\n]\s*S\d{1,2})*))\s*(?:<\|(?:eot_id|end_of_text)\|>\s*)?"
)
_NAMES = {"user": "User", "assistant": "Agent"}

# Code → our label, and the name that the model's template has for it.
_GUARD_2 = {
    "S1": ("VIOLENT_CRIMES", "Violent Crimes. "),
    "S2": ("NON_VIOLENT_CRIMES", "Non-Violent Crimes. "),
    "S3": ("SEX_CRIMES", "Sex Crimes. "),
    "S4": ("CHILD_EXPLOITATION", "Child Exploitation. "),
    "S5": ("SPECIALIZED_ADVICE", "Specialized Advice. "),
    "S6": ("PRIVACY", "Privacy. "),
    "S7": ("INTELLECTUAL_PROPERTY", "Intellectual Property. "),
    "S8": ("INDISCRIMINATE_WEAPONS", "Indiscriminate Weapons. "),
    "S9": ("HATE", "Hate. "),
    "S10": ("SELF_HARM", "Self-Harm. "),
    "S11": ("SEXUAL_CONTENT", "Sexual Content. "),
}
_GUARD_3_1B = {
    "S1": ("VIOLENT_CRIMES", "Violent Crimes."),
    "S2": ("NON_VIOLENT_CRIMES", "Non-Violent Crimes."),
    "S3": ("SEX_CRIMES", "Sex Crimes."),
    "S4": ("CHILD_EXPLOITATION", "Child Exploitation."),
    "S5": ("DEFAMATION", "Defamation."),
    "S6": ("SPECIALIZED_ADVICE", "Specialized Advice."),
    "S7": ("PRIVACY", "Privacy."),
    "S8": ("INTELLECTUAL_PROPERTY", "Intellectual Property."),
    "S9": ("INDISCRIMINATE_WEAPONS", "Indiscriminate Weapons."),
    "S10": ("HATE", "Hate."),
    "S11": ("SELF_HARM", "Self-Harm."),
    "S12": ("SEXUAL_CONTENT", "Sexual Content."),
    "S13": ("ELECTIONS", "Elections."),
}
_GUARD_3 = {**_GUARD_3_1B, "S14": ("CODE_INTERPRETER_ABUSE", "Code Interpreter Abuse.")}
_HEADERS = ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>")


@dataclass(frozen=True, slots=True)
class LlamaGuard:
    """One version. `categories`: code → our label and the model's name; `opens`, `closes`: around the task."""

    categories: Mapping[str, tuple[str, str]]
    opens: str
    closes: str
    reads_logprobs: bool = True
    labels: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", (*(label for label, _ in self.categories.values()), UNSAFE))

    def questions(self, turns: Sequence[Turn]) -> list[Question]:
        """The one question about the last of these turns."""
        messages = tuple((turn.side, (Part(turn.text, True),)) for turn in _alternating(turns))
        return [Question(messages, _MAX_TOKENS, prompt=self._prompt(turns))]

    def read(self, question: Question, said: Said) -> dict[str, float]:
        """The score of each label that the answer names.

        Raises:
            Unreadable: it is anything but a verdict, or names categories that the model does not have.
        """
        match = None if said.is_cut else _ANSWER.fullmatch(said.text)
        if match is None:
            raise Unreadable("it is neither 'safe' nor 'unsafe' with its categories")
        score = self._score(said, match)
        if match[1]:
            return {UNSAFE: score}
        codes = re.findall(r"S\d+", match[3])
        if unknown := [code for code in codes if code not in self.categories]:
            raise Unreadable(f"it names {unknown[0]}, which this model does not have: check judge")
        return {self.categories[code][0]: score for code in codes}

    def _score(self, said: Said, match: re.Match[str]) -> float:
        if not self.reads_logprobs:
            return 0.0 if match[1] else 1.0
        return probability(said, match.start(1 if match[1] else 2), _WORDS)

    def _prompt(self, turns: Sequence[Turn]) -> Prompt:
        role = _NAMES[turns[-1].side]
        listed = "\n".join(f"{code}: {name}" for code, (_, name) in self.categories.items())
        said = [
            part
            for turn in turns
            for part in (Part(f"{_NAMES[turn.side]}: "), Part(turn.text.strip(), True), Part("\n\n"))
        ]
        task = (
            f"{self.opens}Task: Check if there is unsafe content in '{role}' messages in conversations according our "
            "safety policy with the below categories.\n\n"
            f"<BEGIN UNSAFE CONTENT CATEGORIES>\n{listed}\n<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n"
        )
        wanted = (
            f"<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST {role} message in the above "
            "conversation:\n - First line must read 'safe' or 'unsafe'.\n - If unsafe, a second line must include a "
            f"comma-separated list of violated categories.{self.closes}"
        )
        return (Part(task), *said, Part(wanted))


def _alternating(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Chat templates want the user to begin."""
    return turns if turns[0].side == "user" else (Turn("user", ""), *turns)


GUARDS = {
    "llama-guard-2": LlamaGuard(_GUARD_2, "[INST] ", " [/INST]"),
    "llama-guard-3": LlamaGuard(_GUARD_3, *_HEADERS),
    "llama-guard-3-1b": LlamaGuard(_GUARD_3_1B, _HEADERS[0], " " + _HEADERS[1]),
}
