"""One request's checks: every text of its JSON bodies, and what they came to.

**Fail closed**: a body is not searched for the fields known to hold text; every string in it is checked but those
known to hold none (ids, roles, base64 media). So a new field, or an endpoint this file never heard of, is checked.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import orjson

from aim_guardrail.exact_json import exact
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import DetectorFailed, Guard, Session
from aim_guardrail.policy import Direction, Verdict
from aim_kserve.errors import BadRequest, ContentBlocked, ServingError, Unavailable, UpstreamFailed

Json = dict[str, Any]

#: Strings of OpenAI's own protocol that are never text of a prompt or an answer.
NOT_TEXT = frozenset(
    (
        *("id", "object", "model", "created", "type", "role", "index", "finish_reason", "status"),
        *("tool_call_id", "call_id", "item_id", "response_id", "previous_response_id"),
        *("system_fingerprint", "service_tier", "encoding_format", "obfuscation"),
    )
)
#: Strings that are JSON themselves: checked as what they say, not as how it is escaped.
JSON_TEXT = frozenset(["arguments"])
#: What repeats an answer's text in another form, piece by piece: gone (null) where that text had to be changed.
SHADOWS = ("logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids")
#: Prompts in a form that cannot be checked.
_TOKEN_FIELDS = ("prompt", "input", "inputs", "token_ids", "prompt_token_ids")
_EMBEDDED_FIELDS = ("prompt_embeds", "inputs_embeds")
_BASE64 = re.compile(r"[A-Za-z0-9+/=_-]*+")
#: Anything but Base64 behind the comma is text, and checked.
_MEDIA = re.compile(r"data:(?:image|audio|video)/[\w.+-]{1,99}(?:;[\w.+=-]{1,99}){0,9};base64," + _BASE64.pattern)
_PLAIN_KEY = re.compile(r"[a-z_]{1,40}").fullmatch
_LEAST_NUMBER = 10**6
_MAX_DEPTH = 200
_ORDER = {"allow": 0, "flag": 1, "redact": 2, "block": 3}


class Blocked(ContentBlocked):
    """The guardrail's refusal: 400, ``content_filter``, the families, never the value."""

    def __init__(self, where: str, verdict: Verdict) -> None:
        self.families = verdict.families
        named = ", ".join(verdict.families)
        super().__init__(
            f"{where or 'the text'} was blocked by the guardrail: it contains {named}",
            param=where or None,
            code="content_filter",
        )

    def headers(self) -> dict[str, str]:
        return {**super().headers(), **verdict_headers("block", self.families)}


class Screening:
    """The checks of one request: its session, and the strictest action and all families so far.

    Not thread-safe; may be used from one thread after another.
    """

    __slots__ = (
        "_in_json",
        "_keys",
        "_metrics",
        "_path",
        "_skipped",
        "actions",
        "degraded",
        "families",
        "guard",
        "session",
    )

    def __init__(self, guard: Guard, metrics: Metrics) -> None:
        self.guard = guard
        self.session = Session()
        self.actions: dict[Direction, str] = {"prompt": "allow", "answer": "allow"}
        self.families: dict[str, None] = {}
        self.degraded: dict[str, None] = {}
        self._metrics = metrics
        self._path: list[str | int] = []
        self._skipped: frozenset[str] = frozenset()
        self._keys = 0
        self._in_json = False  # within a string that is JSON itself

    # --- outcome --------------------------------------------------------------------------------------------------

    @property
    def action(self) -> str:
        """The strictest action of prompt and answer."""
        return max(self.actions.values(), key=_ORDER.__getitem__)

    def headers(self) -> dict[str, str]:
        """What the client is told: ``x-guardrail-verdict``, ``-families`` and ``-degraded``."""
        return verdict_headers(self.action, tuple(sorted(self.families)), tuple(self.degraded))

    def log_fields(self) -> dict[str, Any]:
        """What the access log is told."""
        fields: dict[str, Any] = {"verdict": self.action}
        if self.families:
            fields["families"] = sorted(self.families)
        if self.degraded:
            fields["degraded"] = list(self.degraded)
        return fields

    def note(self, direction: Direction, verdict: Verdict) -> None:
        """Count a final verdict."""
        if _ORDER[verdict.action] > _ORDER[self.actions[direction]]:
            self.actions[direction] = verdict.action
        self.families.update(dict.fromkeys(verdict.families))
        self.degraded.update(dict.fromkeys(verdict.degraded))
        for detector in verdict.degraded:
            self._metrics.detector_failed(detector, "degraded")
        self._metrics.detected(direction, verdict, self.guard.policy)

    def failed(self, error: DetectorFailed) -> Unavailable:
        """A detector failed and the policy fails closed: what the client is told."""
        self._metrics.detector_failed(error.detector, "closed")
        return Unavailable(
            f"the guardrail's detector {error.detector!r} failed and nothing passes unchecked: ask again",
            code="guardrail_failed",
        )

    # --- checks ---------------------------------------------------------------------------------------------------

    def text(self, direction: Direction, text: str, where: str = "") -> str:
        """The text as it may pass.

        Raises:
            Blocked: it may not.
            Unavailable: a detector failed and the policy fails closed.
        """
        try:
            checked = self.guard.check(direction, text, self.session)
        except DetectorFailed as error:
            raise self.failed(error) from error
        verdict = checked.verdict
        if verdict.action != "allow" or verdict.degraded:
            self.note(direction, verdict)
            if verdict.blocked:
                raise Blocked(where or self._where(), verdict)
        return checked.text

    def json_text(self, direction: Direction, text: str) -> str:
        """A string that is JSON itself, such as a tool call's arguments. Raises as :meth:`text`.

        What it says is checked, its numbers too, however it is escaped; where it is not valid JSON (cut short by a
        token limit), its escapes are resolved first, and only if that changes nothing it passes as it is. One that
        gives a key twice is written anew: our parser saw only the last of the two.
        """
        try:
            value = exact(orjson.loads(text), text)
        except orjson.JSONDecodeError:
            plain = unescaped(text)
            checked = self.text(direction, plain)
            return checked if checked != plain else text
        box, outer = {"": value}, (self._skipped, self._keys, self._in_json)
        self._skipped, self._keys, self._in_json = frozenset(), -1, True  # the tool's own fields, whatever their names
        try:
            changed = self._object(direction, box)
            changed = changed or (text.count(":") != self._keys and _repeats_a_key(text))
        finally:
            self._skipped, self._keys, self._in_json = outer
        return orjson.dumps(box[""]).decode() if changed else text

    def body(self, direction: Direction, body: Json, *, skip: frozenset[str] = frozenset()) -> bool:
        """Check every text in ``body`` but the fields to ``skip``, and put redacted ones in its place; True if
        ``body`` is another now.

        Raises:
            Blocked, Unavailable: as :meth:`text`.
            BadRequest: a prompt that cannot be checked (token ids, embeddings), or nested deeper than 200 levels.
            UpstreamFailed: an answer nested deeper than that.
        """
        self._keys, self._skipped = 0, skip
        try:
            return self._object(direction, body)
        finally:
            self._path.clear()

    def has_repeated_keys(self, body: bytes) -> bool:
        """Whether the JSON ``body`` last checked might give a key twice (never a false no).

        Our parser keeps the last of two, the predictor's may keep the first: such a body must not be sent on as it
        came. Each key has its colon, so a text with as many colons as keys were met has none twice.
        """
        return body.count(b":") != self._keys

    def _object(self, direction: Direction, node: Json) -> bool:
        path, skipped = self._path, self._skipped
        if len(path) > _MAX_DEPTH:
            raise _too_deep(direction)
        self._keys += len(node)
        path.append("")
        changed = self._names(direction, node)
        for key, value in node.items():
            kind = type(value)
            if kind is str:
                if key not in skipped:
                    path[-1] = key
                    checked = self._string(direction, key, value)
                    if checked != value:
                        node[key] = checked
                        changed = True
            elif kind is dict or kind is list:
                path[-1] = key
                changed = self._nested(direction, key, value) or changed
            elif kind is int and self._in_json:
                path[-1] = key
                node[key] = self._number(direction, value)
                changed = changed or node[key] != value
        path.pop()
        if direction == "prompt":
            self._refuse_embeddings(node)
        elif changed:
            drop_shadows(node)
        return changed

    def _names(self, direction: Direction, node: Json) -> bool:
        """Check the keys that are more than a plain word: they say something, too."""
        if all(map(_PLAIN_KEY, node)):
            return False
        checked = {key: key if _PLAIN_KEY(key) else self.text(direction, key) for key in node}
        if all(key == name for key, name in checked.items()):
            return False
        items = [(checked[key], value) for key, value in node.items()]
        node.clear()
        node.update(items)
        return True

    def _number(self, direction: Direction, value: int) -> int | str:
        """A number as it may pass: a card number is one without its quotes."""
        if value < _LEAST_NUMBER:
            return value
        checked = self.text(direction, str(value))
        return value if checked == str(value) else checked

    def _nested(self, direction: Direction, key: str, value: Any) -> bool:
        if direction == "answer" and key in SHADOWS:
            return False
        if type(value) is dict:
            return self._object(direction, value)
        if direction == "prompt" and key in _TOKEN_FIELDS:
            self._refuse_tokens(value)
        return self._list(direction, value)

    def _list(self, direction: Direction, node: list[Any]) -> bool:
        path, changed = self._path, False
        if len(path) > _MAX_DEPTH:
            raise _too_deep(direction)
        path.append(0)
        for index, value in enumerate(node):
            kind = type(value)
            if kind is dict or kind is list:
                path[-1] = index
                changed = (self._object if kind is dict else self._list)(direction, value) or changed
            elif kind is str:
                path[-1] = index
                checked = self._string(direction, "", value)
                if checked != value:
                    node[index] = checked
                    changed = True
            elif kind is int and self._in_json:
                node[index] = self._number(direction, value)
                changed = changed or node[index] != value
        path.pop()
        return changed

    def _string(self, direction: Direction, key: str, value: str) -> str:
        if not value or (value.startswith("data:") and _MEDIA.fullmatch(value)):
            return value
        if key in JSON_TEXT:
            return self.json_text(direction, value)
        if key == "data" and "input_audio" in self._path and _BASE64.fullmatch(value):
            return value
        return self.text(direction, value)

    def _refuse_tokens(self, value: list[Any]) -> None:
        first = value[0] if value else None
        if type(first) is int or (type(first) is list and first and type(first[0]) is int):
            where = self._where()
            raise BadRequest(f"{where}: token ids cannot be checked by the guardrail: give text", param=where)

    def _refuse_embeddings(self, node: Json) -> None:
        for field in _EMBEDDED_FIELDS:
            if node.get(field) is not None:
                raise BadRequest(f"{field}: embeddings cannot be checked by the guardrail: give text", param=field)

    def _where(self) -> str:
        """``messages[1].content`` of the value being checked."""
        parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self._path if part != "")
        return parts.lstrip(".")


def _too_deep(direction: Direction) -> ServingError:
    if direction == "answer":
        return UpstreamFailed(
            f"the predictor's answer is nested deeper than {_MAX_DEPTH} levels: it cannot be checked",
            code="predictor_invalid",
        )
    return BadRequest(f"the JSON is nested deeper than {_MAX_DEPTH} levels: flatten it", code="invalid_json")


def drop_shadows(node: Json) -> bool:
    """Null what repeats an answer's text piece by piece; True if there was any."""
    dropped = [shadow for shadow in SHADOWS if node.get(shadow) is not None]
    for shadow in dropped:
        node[shadow] = None
    return bool(dropped)


class Timed:
    """``with``: what is done in it is one request's check of one direction, counted with its decision."""

    __slots__ = ("_direction", "_metrics", "_screening", "_started")

    def __init__(self, screening: Screening, metrics: Metrics, direction: Direction) -> None:
        self._screening, self._metrics, self._direction = screening, metrics, direction

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        decision = self._screening.actions[self._direction]
        if error is not None and not isinstance(error, Blocked):
            decision = "error"
        self._metrics.checked(self._direction, decision, time.perf_counter() - self._started)


def verdict_headers(action: str, families: tuple[str, ...], degraded: tuple[str, ...] = ()) -> dict[str, str]:
    """``x-guardrail-*`` response headers."""
    headers = {"x-guardrail-verdict": action}
    if families:
        headers["x-guardrail-families"] = ",".join(families)
    if degraded:
        headers["x-guardrail-degraded"] = ",".join(degraded)
    return headers


def unescaped(text: str) -> str:
    """JSON's escapes in a piece of JSON resolved, whatever else is wrong with it."""
    return _ESCAPE.sub(_plain, text) if "\\" in text else text


_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.?))", re.DOTALL)
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _plain(escape: re.Match[str]) -> str:
    if escape[1] is None:
        return _ESCAPES.get(escape[2], escape[2])
    code = int(escape[1], 16)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\N{REPLACEMENT CHARACTER}"


def _repeats_a_key(text: str) -> bool:
    """Whether an object in valid JSON, not too deep, gives a key twice."""
    repeated = False

    def look(pairs: list[tuple[str, Any]]) -> None:
        nonlocal repeated
        repeated = repeated or len(pairs) != len({key for key, _ in pairs})

    json.loads(text, object_pairs_hook=look)
    return repeated
