"""Judge injection: a text that is judged holds what ends it in its judge's template, or begins what is not in it.

Servers read special tokens wherever they stand in a prompt, and a model takes a line that begins with `User:` for
somebody's turn. So such spellings, of all the templates here and of the chat templates of today's models, are broken up
in what is judged, visibly and without losing a word: `<|eot_id|>` becomes `< |eot_id| >`, `<END CONVERSATION>` becomes
`( END CONVERSATION>`, and `User:` at a line's start `User -`.
"""

from __future__ import annotations

import re

#: Line ends by Unicode that `^` does not know.
_LINES = str.maketrans(dict.fromkeys("\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", "\n"))
#: What most special tokens are written with.
_SPECIAL = re.compile(
    r"[<\[](?=[|｜])|(?<=[|｜])>|\[(?=/?(?:INST|SYSTEM_PROMPT|TOOL_\w{1,20}|AVAILABLE_TOOLS|gMASK)\])"
)
#: Special tokens that are words in angle brackets, and the tags of templates and of answers.
_WORDS = (
    *("s", "bos", "eos", "pad", "unk", "mask", "sop", "eop", "SYS", "<SYS", "think", "score", "confidence", "guardian"),
    *("start_of_turn", "end_of_turn", "start_of_image", "tool_call", "tool_response", "fim_prefix", "fim_middle"),
    *("fim_suffix", "filename", "reponame", "begin_of_text", "end_of_text", "im_start", "im_end", "start_of_role"),
    *("end_of_role", "start_of_conversation", "end_of_conversation", "start_of_risk_definition"),
    *("end_of_risk_definition", "categories", "guardianconfig", r"BEGIN\s{1,8}UNSAFE", r"END\s{1,8}UNSAFE"),
    *(r"BEGIN\s{1,8}CONVERSATION", r"END\s{1,8}CONVERSATION"),
)
_ANGLE = re.compile("<")
_TAG = re.compile(rf"<\s{{0,8}}/?\s{{0,8}}(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
#: Who or what begins a line, by any of the templates.
_LABEL = re.compile(
    r"[^\w\n]*(?:(?:User|Agent|Assistant|Human|AI|System)(?: Message)?|Context|Tools Available|Criteria|"
    r"Scoring Schema)[^\w\n]*[:：]",
    re.IGNORECASE,
)
_COLON = re.compile("[:：]")


def inert(text: str) -> str:
    """The text as it may stand in a template: it can neither end its place there nor begin another. Linear, and no
    step of it holds up other threads: one regular expression over all of a hostile text would.
    """
    text = _SPECIAL.sub(_apart, text.translate(_LINES))
    text = _ANGLE.sub(lambda found: "( " if _TAG.match(found.string, found.start()) else "<", text)
    return "\n".join(map(_no_label, text.split("\n")))


def _apart(found: re.Match[str]) -> str:
    return " >" if found[0] == ">" else f"{found[0]} "


def _no_label(line: str) -> str:
    label = _LABEL.match(line)
    return line if label is None else _COLON.sub(" -", label[0]) + line[label.end() :]
