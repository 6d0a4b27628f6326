"""Pictures among the strings of a body: by what they begin with, or by their place where they are links."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Literal

from aim_guardrail.slots.places import Kind

_BEGINNING = re.compile(r"\s*+(?:data:[^,]{0,200}+,)?+\s*+([A-Za-z0-9+/_-]{24})", re.IGNORECASE)
_DATA = re.compile(r"\s*+data:", re.IGNORECASE)
_IMAGE_URI = re.compile(r"\s*+data:image/", re.IGNORECASE)
_LINK = re.compile(r"\s*+[a-z][a-z0-9+.-]{1,20}://", re.IGNORECASE)
_OTHER_LINKS = frozenset(["video_url", "audio_url"])

#: What files of pictures begin with: PNG, JPEG, GIF, TIFF, JPEG XL and 2000, SVG.
_MAGIC = (
    b"\x89PNG\r\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"\xff\x0a",
    b"\0\0\0\x0cJXL ",
    b"\0\0\0\x0cjP  ",
    b"<svg",
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heif", b"mif1", b"msf1")


def picture(kind: Kind, path: Sequence[str | int], value: str) -> Literal["picture", "link"] | None:
    """What a string has to do with pictures, where such a kind of place may have them: it is one, a data URI or Base64
    that begins as pictures do; or it says where one is, where the protocol has a picture's address.
    """
    if _IMAGE_URI.match(value):
        return "picture"
    beginning = _BEGINNING.match(value)
    if beginning is not None and is_picture_file(base64.b64decode(beginning[1], altchars=b"-_")):
        return "picture"
    return "link" if _stands_for_picture(kind, path[-2:], value) else None


def is_picture_file(beginning: bytes) -> bool:
    """Whether a file that begins so (its first 18 bytes) is a picture."""
    if beginning.startswith(_MAGIC):
        return True
    if beginning[:4] == b"RIFF":
        return beginning[8:12] == b"WEBP"
    if beginning[:2] == b"BM":
        return beginning[6:10] == b"\0\0\0\0"
    return beginning[4:8] == b"ftyp" and beginning[8:12] in _BRANDS


def _stands_for_picture(kind: Kind, names: Sequence[str | int], value: str) -> bool:
    if kind is Kind.LINK:
        return _OTHER_LINKS.isdisjoint(names) and not _DATA.match(value)
    return "image_url" in names and _LINK.match(value) is not None
