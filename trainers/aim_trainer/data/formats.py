"""The other ways of writing a row, and which one a file has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .conversation import conversation
from .examples import Completion, Conversation, Example, Labelled, Message
from .problems import RowProblem, named, shortened

Record = dict[str, Any]
#: What ShareGPT calls a role, in its own files and in those of others.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
#: A row of (document, summary), asked as it will be asked when served.
SUMMARIZE = "Summarize the following text.\n\n"


class Format(NamedTuple):
    """needed: by these keys a first row is known; optional: other keys that are read. All else in a row is not."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Example]


def prompt_completion(record: Record) -> Example:
    """{prompt, completion}: two texts, or two lists of messages. Raises RowProblem."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _two_lists(record, prompt, completion)
    answer = _text(record, "completion")
    if not answer.strip():
        raise RowProblem("completion", "is empty: nothing to train on")
    return Completion(_text(record, "prompt"), answer)


def _two_lists(record: Record, prompt: list[Any], completion: list[Any]) -> Conversation:
    read = conversation({"messages": prompt + completion, "tools": record.get("tools")})
    asked = {position for position in range(len(prompt)) if read.messages[position]["role"] == "assistant"}
    untrained = tuple(sorted(asked.union(read.untrained)))
    if all(position in untrained for position, said in enumerate(read.messages) if said["role"] == "assistant"):
        raise RowProblem("completion", "no assistant turn to train on")
    return read._replace(untrained=untrained)


def alpaca(record: Record) -> Completion | Conversation:
    """{instruction, input?, output, system?, history?: [[asked, answered], …]}. Raises RowProblem."""
    asked = _text(record, "instruction")
    if given := _optional(record, "input"):
        asked = f"{asked}\n{given}"
    answer = _text(record, "output")
    if not answer.strip():
        raise RowProblem("output", "is empty: nothing to train on")
    system, history = _optional(record, "system"), _history(record)
    if not system and not history:
        return Completion(asked, answer)
    messages = [{"role": "system", "content": system}] if system else []
    return Conversation([*messages, *history, *_turn(asked, answer)])


def _history(record: Record) -> list[Message]:
    history = record.get("history") or []
    if not isinstance(history, list):
        raise RowProblem("history", f"a list of [asked, answered] is expected, not {shortened(history)}")
    messages: list[Message] = []
    for position, pair in enumerate(history):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise RowProblem(
                f"history[{position}]", f"[asked, answered], two texts, is expected, not {shortened(pair)}"
            )
        if not pair[1].strip():
            raise RowProblem(f"history[{position}][1]", "the assistant's answer is empty")
        messages += _turn(*pair)
    return messages


def sharegpt(record: Record) -> Conversation:
    """{conversations: [{from, value}, …], system?, tools?}. Raises RowProblem, which names ShareGPT's fields."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowProblem("conversations", f"a list of {{from, value}} is expected, not {shortened(turns)}")
    system = _optional(record, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [_spoken(turn, f"conversations[{position}]") for position, turn in enumerate(turns)]
    return conversation({"messages": messages, "tools": record.get("tools")})


def _spoken(turn: Any, field: str) -> Message:
    if not isinstance(turn, dict):
        raise RowProblem(field, f"{{from, value}} is expected, not {shortened(turn)}")
    role = _SPEAKERS.get(speaker) if isinstance(speaker := turn.get("from"), str) else None
    if role is None:
        raise RowProblem(f"{field}.from", f"one of {', '.join(_SPEAKERS)} is expected, not {shortened(speaker)}")
    value = turn.get("value")
    if not isinstance(value, str):
        raise RowProblem(f"{field}.value", f"text is expected, not {shortened(value)}")
    if role == "assistant" and not value.strip():
        raise RowProblem(f"{field}.value", "the assistant's answer is empty")
    weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}
    return {"role": role, "content": value, **weight}


def classification(labels: Sequence[str]) -> Callable[[Record], Labelled]:
    """Reads {text, label}: label one of `labels`, or its position among them."""
    positions = {label: position for position, label in enumerate(labels)}

    def read(record: Record) -> Labelled:
        text, label = _text(record, "text"), record.get("label")
        if not text.strip():
            raise RowProblem("text", "is empty")
        if type(label) is int and 0 <= label < len(labels):
            return Labelled(text, label)
        if not isinstance(label, str) or label not in positions:
            known = ", ".join(labels)
            raise RowProblem("label", f"one of dataset.labels ({known}) is expected, not {shortened(label)}")
        return Labelled(text, positions[label])

    return read


def formats(labels: Sequence[str]) -> dict[str, Format]:
    """All there are, by the job's names for them."""
    return {
        "conversation": Format(("messages",), ("tools",), conversation),
        "sharegpt": Format(("conversations",), ("system", "tools"), sharegpt),
        "alpaca": Format(("instruction", "output"), ("input", "system", "history"), alpaca),
        "prompt-completion": Format(("prompt", "completion"), ("tools",), prompt_completion),
        "classification": Format(("text", "label"), (), classification(labels)),
    }


def guessed(first: Record, known: dict[str, Format]) -> str:
    """Name of the format whose keys a first row has. Raises RowProblem that says which keys there are."""
    for name, form in known.items():
        if all(key in first for key in form.needed):
            return name
    needs = "; ".join(f"{name} by {' and '.join(form.needed)}" for name, form in known.items())
    keys = named(first)
    raise RowProblem("", f"its format cannot be told by its keys ({keys}): {needs}. Name the fields in dataset.columns")


def as_conversation(example: Example) -> Conversation:
    """A prompt and its completion as two turns."""
    if isinstance(example, Conversation):
        return example
    if isinstance(example, Completion):
        return Conversation(_turn(example.prompt, example.completion))
    raise RowProblem("", "is a text and a label; that is of template classification")


def _turn(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _text(record: Record, field: str) -> str:
    value = record.get(field)
    if isinstance(value, str):
        return value
    raise RowProblem(field, "is missing" if field not in record else f"text is expected, not {shortened(value)}")


def _optional(record: Record, field: str) -> str:
    return "" if record.get(field) is None else _text(record, field)
