"""Places: what stands where in a body of a protocol that is known. Skipping is by place, never by a key's name.

A tree of places follows a body's keys (lists hold what their place says). Where a tree ends, or knows nothing of a
key, the place is `FREE`: whatever anybody put there, checked to its last string, and its keys say something of their
values. So a field that is new to us is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum


class Kind(Enum):
    """How the strings of a place are read."""

    FREE = "anybody's: its key is context for it"
    TEXT = "the protocol's own field of text: its key says nothing of it"
    ID = "an identifier: no text, where it has the form of one"
    WORD = "a word of the protocol's: no text, where it has the form of one"
    NAME = "a tensor's name or type: no text, where it has the form of one"
    JSON = "JSON in a string"
    LINK = "a picture or sound, as a data URI; or where to find one"
    BASE64 = "a picture, sound or file in Base64"
    FILE = "a picture or file in Base64, where it begins as such files do, or text"
    SHADOW = "repeats an answer's text in another form, piece by piece"


_BASE64 = r"[A-Za-z0-9+/=_-]*+"
_DATA_URI = r"data:(?:image|audio|video)/[\w.+-]{1,99}(?:;[\w.+=-]{1,99}){0,9};base64,"
is_base64 = re.compile(_BASE64).fullmatch
is_data_uri = re.compile(_DATA_URI + _BASE64).fullmatch
#: How files of pictures and sound begin, in Base64: PNG, JPEG, GIF, RIFF (WebP, WAV), BMP, TIFF, Ogg, FLAC, ID3, MP3,
#: Matroska, and what has `ftyp` behind its length (MP4, HEIC, AVIF).
_SIGNATURE = (
    "iVBORw0KGgo|/9j/|R0lGOD[dl]|UklGR|Qk[0-3]|SUkqA|TU0AK|T2dnU|ZkxhQ|SUQz|//[I-Po-v]|GkXfo"
    r"|AAAA[A-Za-z0-9+/]GZ0eXB"
)
#: The same without a data URI around it, or a PDF.
is_file = re.compile(f"(?:{_SIGNATURE}|JVBERi){_BASE64}").fullmatch
is_media_file = re.compile(f"{_DATA_URI}(?:{_SIGNATURE}){_BASE64}").fullmatch
#: `chatcmpl-1`, `org/model:tag`: no spaces, no @.
is_id = re.compile(r"[A-Za-z0-9_.:/-]{0,200}").fullmatch
#: `assistant`, `chat.completion.chunk`: no capitals, no digits.
is_word = re.compile(r"[a-z_.-]{0,64}").fullmatch
#: `text`, `input_ids`, `INPUT0`, `FP32`: one word, with at most three digits behind it.
is_name = re.compile(r"[A-Za-z_.-]{0,40}[0-9]{0,3}").fullmatch
#: A key that says nothing but itself.
is_plain_key = re.compile(r"[a-z_]{1,40}").fullmatch

#: Of a kind, how its strings look where they are no text; of the others all are.
_FORMS: dict[Kind, Callable[[str], object]] = {
    Kind.WORD: is_word,
    Kind.NAME: is_name,
    Kind.ID: is_id,
    Kind.LINK: is_data_uri,
    Kind.BASE64: lambda value: is_base64(value) or is_data_uri(value),
    Kind.FILE: is_file,
    Kind.FREE: lambda value: is_media_file(value) if value.startswith("data:") else None,
}


_WITHOUT_PICTURES = frozenset([Kind.WORD, Kind.ID, Kind.JSON, Kind.SHADOW, Kind.TEXT])


class Place:
    """One place. `children`: those of its keys that are known, `others`: all others; `parts`: a list in it holds parts
    of one text; `pictured`: its strings may be pictures.
    """

    __slots__ = ("_form", "children", "is_free", "kind", "others", "parts", "pictured")

    def __init__(
        self, kind: Kind = Kind.TEXT, /, *, parts: bool = False, others: Place | None = None, **children: Place
    ) -> None:
        self.kind = kind
        self.is_free = kind is Kind.FREE
        self.pictured = kind not in _WITHOUT_PICTURES
        self._form = _FORMS.get(kind)
        self.parts = parts
        self.children = children
        self.others = others if others is not None else self if self.is_free else FREE

    def get(self, key: str) -> Place:
        """What stands under a key."""
        return self.children.get(key, self.others)

    def is_no_text(self, value: str) -> bool:
        """Whether a string is what stands here instead of text."""
        return self._form is not None and self._form(value) is not None

    def under(self, key: str) -> Place:
        """An object that has this place under a key."""
        box = Place()
        box.children[key] = self
        return box


FREE = Place(Kind.FREE)
JSON = Place(Kind.JSON)
FREE.children["arguments"] = JSON  # how every protocol writes a call of a tool
_CONTENT = Place(Kind.FREE, parts=True, others=FREE, arguments=JSON)
FREE.children["content"] = _CONTENT.children["content"] = _CONTENT  # and a message's parts
TEXT = Place()
ID = Place(Kind.ID)
WORD = Place(Kind.WORD)
NAME = Place(Kind.NAME)
LINK = Place(Kind.LINK)
BASE64 = Place(Kind.BASE64)
FILE = Place(Kind.FILE)
SHADOW = Place(Kind.SHADOW)

#: What repeats an answer's text in another form: gone (null) where that text had to be changed, wherever it stands.
SHADOWS = ("logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids")
#: Prompts in a form that cannot be checked.
TOKENS = frozenset(["prompt", "input", "inputs", "token_ids", "prompt_token_ids"])
EMBEDDINGS = ("prompt_embeds", "inputs_embeds")

#: Beside the one a value stands the other, which says what it is: `{"name": "DB_PASSWORD", "value": …}`, a tensor.
LABELS = ("name", "key")
LABELLED = frozenset(["value", "values", "data"])
