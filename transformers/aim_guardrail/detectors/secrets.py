"""Secrets: Kingfisher's rules (488, Rust and vectorscan), ours beside them (secrets.yaml), private key blocks.

Offline and in process; nothing is ever validated against a provider. Compiling the rules takes about 5 CPU seconds;
the compiled database is cached on disk and then loads in about 0.5 s. The cache is the directory in
`KF_RULE_CACHE_DIR`, else the user's cache directory; it may be read-only. It must belong to the user of the process
and was best written by `warm_cache()` when the image was built. Without a usable cache everything works, 5 s later.

Not every rule of the catalogue can be used by a guard, because a guard must decide before it has seen everything:
rules that need another value elsewhere (`depends_on_rule`), helper rules that are no secrets (ids, host names) and
the few below are left out. secrets.yaml restores what matters of them.
"""

from __future__ import annotations

import base64
import functools
import logging
import re
from collections.abc import Iterator
from importlib import resources
from typing import get_args, get_type_hints

from kingfisher_sdk import Rules, Scanner

from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.decoded import with_views
from aim_guardrail.detectors.linear_patterns import LinearPattern
from aim_guardrail.detectors.views import views
from aim_guardrail.text import BREAK_CHARS, BREAKS, CONTEXT_CHARS, PRIVATE_KEY, WINDOW_CHARS, Text

_Match = tuple[int, float, str]
"""Where a match ends, its score, its rule."""

_LOG = logging.getLogger(__name__)

_LEFT_OUT = frozenset(
    {
        # Look back over whole command lines or objects, or match across them.
        "betterleaks.curl-auth-header",
        "betterleaks.curl-auth-user",
        "betterleaks.gcp-application-default-credentials",
        "betterleaks.gcp-service-account",
        "betterleaks.kubernetes-secret-yaml",
        "betterleaks.mongodb-connection-string",  # generic-credential-uri finds the password in it
        # Capture whitespace.
        "betterleaks.canadian-digital-service-notify-api-key",
        "betterleaks.flyio-access-token",
        "betterleaks.private-key",
        # Capture only a part of the secret.
        "betterleaks.jwt-base64",
        "betterleaks.microsoft-teams-webhook",
    }
)
# The value is a password by its place: it may be short, and without a digit.
_CURL_RULE = "aim.curl-password"
_PASSWORD_RULES = frozenset({"betterleaks.generic-credential-uri", "aim.uri-password", _CURL_RULE})
_BASIC_RULE = "aim.basic-credentials"
_PRIVATE_KEY_RULE = "aim.private-key"

# The value may be anything: these know only what stands before it.
_BY_NAME = frozenset(
    {
        "aim.assignment",
        "aim.auth-header",
        "aim.authorization",
        "aim.aws-session-token",
        "aim.command-password",
        "aim.quoted-password",
        "aim.spoken-password",
    }
)
# A value by its name alone is none where it is cut short or masked, or where a view shows only its first part.
_CUT_SHORT = ("..", "****", "/", "+")
# Tokens that continue a list or name a request or a version, and the name of a secret in AWS, are no credentials.
_NO_CREDENTIAL = re.compile(
    r"(?:(?:next|page|pagination|continuation|forward|backward|lock|change|sync|idempotency)[_-]?token"
    r"|\barn:[^\s\"']{1,128}:secret)[\"'`]?\s{0,3}[=:>]{1,3}\s{0,3}\\?[\"'`]?\Z",
    re.IGNORECASE,
)
# What stands in code where a value might: a call of a method, or of a function that encodes; a setting; a type.
_CALL = re.compile(
    r"(?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*|\w*(?:b(?:16|32|58|64|85)|base64|b2a|a2b|md5|sha[0-9]|utf_?8|pbkdf2|x509)\w*",
    re.ASCII,
)
_REFERENCE = re.compile(
    r"(?:self|this|cls|os|args|opts|config|settings|process|request|req|env)(?:\.[A-Za-z_]\w*)+", re.ASCII
)
_TYPE = re.compile(r"(?:\w+\.)*\w*(?:Private|Public|Secret)Key", re.ASCII)
_OWN_NAME = re.compile(r"(?<![\w.-])([A-Za-z_]\w{0,63})\s{0,3}=\s{0,3}\Z", re.ASCII)
_PAIRED = frozenset("*_~/\\")

_SCORES = {"high": 0.9, "medium": 0.6, "low": 0.3}
"""The scanner's words for its confidence. "low" is what it says of passwords for localhost and of well-known ones."""

# Passwords everybody knows, from the manuals of databases and brokers, and what only names what belongs there
# (`secret_access_key`). A password equal to its user's name is another.
_WELL_KNOWN = re.compile(
    "admin|administrator|anonymous|changeit|changeme|default|demo|docker|elastic|example|foobared|guest|mariadb|minio"
    "|minioadmin|mongo|mongodb|mypassword|mysecretpassword|mysql|pass|passwd|password|postgres|pwd|rabbitmq|redis|root"
    "|secret|test|testing|user|username|yourpassword"
    "|(?:(?:access|account|api|auth|db|my|private|secret|some|the|user|your)[-_]?){1,4}"
    "(?:id|key|pass|passwd|password|secret|token)",
    re.IGNORECASE,
)
_NAME_EDGE = re.compile(r"[\s:/@=\"'`]")
_LONG_RUN = re.compile(f"[^{BREAKS}]{{8,}}")
_LONGER_RUN = re.compile(f"[^{BREAKS}]{{12}}")
# Of long texts, in a tenth of the time: a run of 12, or of 8 with a digit, a URI, a key block, user:password
_SECRET = LinearPattern(
    rf"[^{BREAKS}]{{12}}|://|-----|[^\s:\"']:[^\s\"']{{3}}|"
    + "|".join(rf"[^{BREAKS}]{{{at}}}[0-9][^{BREAKS}]{{{7 - at}}}" for at in range(8))
)
_LONG_CHARS = 128
_DIGIT = re.compile("[0-9]")
_SPACE = re.compile(r"\s")
_PAIR = re.compile(r":(?<=[^\s:\"'].)[^\s\"']{3}")  # user:password
# The name of a digest before its value (Subresource Integrity, lock files), and the lengths such a value has in Base64
# or in hexadecimal digits, Base64's padding aside.
_DIGEST_NAME = re.compile(r"sha-?(1|224|256|384|512)[-:=]\Z", re.IGNORECASE)
_DIGEST_CHARS = {"1": (27, 40), "224": (38, 56), "256": (43, 64), "384": (64, 96), "512": (86, 128)}
_CURL = re.compile(r"\bcurl\s[^|;]*\Z")
_COMMAND_CHARS = 400
_QUERY_NAME = re.compile(r"[?&][\w.\[\]-]{1,64}=\Z")


class SecretDetector:
    """Finds secrets. Loading blocks for 0.5-5 s; scanning releases the GIL and is thread-safe."""

    family = "secrets"
    labels = frozenset({"SECRET"})

    def __init__(self) -> None:
        self._rules, self._scanner = _engine()
        self._ignored = _ignored(self._rules)
        # Not a key, but shaped like one. Should the rules not have loaded as we know them, say so at start-up.
        canary = Text("AKIA" + "Q3EGRBL7JX2VWP5M")
        if len(self.scan(canary)) != 1:
            raise RuntimeError("the secret rules do not find a known sample: check the kingfisher version")

    def may_find(self, scan: str) -> bool:
        """A secret is at least 8 characters with a digit, or at least 12, or a password in its place."""
        if _LONG_CHARS <= len(scan) <= WINDOW_CHARS:
            return _SECRET.search(scan)
        if (
            len(scan) > WINDOW_CHARS
            or "://" in scan
            or "-----" in scan
            or _LONGER_RUN.search(scan)
            or _PAIR.search(scan)
        ):
            return True
        return bool(_DIGIT.search(scan)) and any(_DIGIT.search(run) for run in _LONG_RUN.findall(scan))

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        """Secrets that end after `since`. About 30 us for a chat message of 500 characters."""
        return with_views(text, since, self._plain)

    def _plain(self, text: Text, since: int) -> list[Finding]:
        scan = text.scan
        by_start: dict[int, list[_Match]] = {}
        judged: set[tuple[int, int, str]] = set()  # views find the same
        for start, end in _windows(scan, since):
            self._scan_window(scan, start, end, by_start, judged)
        found = [(start, *match) for start, matches in by_start.items() for match in _exact(scan, start, matches)]
        if "-----" in scan:
            found += [
                (*block.span(), _SCORES["high"], _PRIVATE_KEY_RULE) for block in PRIVATE_KEY.finditer(scan, since)
            ]
        return _findings(text, found)

    def _scan_window(
        self,
        scan: str,
        since: int,
        end: int,
        by_start: dict[int, list[_Match]],
        judged: set[tuple[int, int, str]],
    ) -> None:
        first = max(0, since - CONTEXT_CHARS)
        for view in views(scan[first:end]):
            for match in self._scanner.scan(view):
                where, rule_id = match.location, match.rule_id
                start, end = (first + at for at in _trim(view, where["start_offset"], where["end_offset"]))
                if end <= since or rule_id in self._ignored or (start, end, rule_id) in judged:
                    continue
                judged.add((start, end, rule_id))
                if _is_secret(scan, start, end, rule_id):
                    score = _score(scan, start, end, rule_id, match.confidence)
                    by_start.setdefault(start, []).append((end, score, rule_id))


def warm_cache() -> str:
    """Compile the rules into the cache (for image builds). Returns the outcome: stored, loaded or bypassed."""
    return str(_engine()[0].cache_status)


def _windows(scan: str, since: int) -> Iterator[tuple[int, int]]:
    """The text from `since` on in windows that end behind whitespace, where no value goes on.

    Each is scanned with `CONTEXT_CHARS` before it, which finds the same (see `Detector`) and keeps the cost linear:
    the scanner's own is not, for every text, and Python may turn to other threads in between.
    """
    while since < len(scan):
        space = _SPACE.search(scan, since + WINDOW_CHARS)
        end = space.end() if space else len(scan)
        yield since, end
        since = end


def _is_secret(scan: str, start: int, end: int, rule_id: str) -> bool:
    """Besides passwords in their place, nothing short, no plain words, no plain numbers and no digest of a file."""
    value = scan[start:end]
    if rule_id == _CURL_RULE:
        return _CURL.search(scan, max(0, start - _COMMAND_CHARS), start) is not None
    if rule_id in _PASSWORD_RULES:
        return bool(value)
    if rule_id == _BASIC_RULE:
        return (len(value) >= 12 or _DIGIT.search(value) is not None) and _is_basic(value)
    if rule_id in _BY_NAME and (scan.startswith(_CUT_SHORT, end) or _is_no_credential(scan, start)):
        return False
    if rule_id == "aim.assignment" and _is_code(scan, start, end):
        return False
    long = len(value) >= 16 or (len(value) >= 8 and _DIGIT.search(value) is not None)
    return long and not value.isdigit() and not _is_digest(scan, start, value)


def _is_no_credential(scan: str, start: int) -> bool:
    before = scan[max(0, start - 160) : start].lower()
    return ("token" in before or "secret" in before) and _NO_CREDENTIAL.search(before) is not None


def _is_code(scan: str, start: int, end: int) -> bool:
    """Whether what is assigned to `token` or `private_key` is computed (`b64encode(x)`, `os.environ2`), a type, or an
    argument of the same name.
    """
    value = scan[start:end]
    if scan[start - 1 : start] in ("'", '"', "`"):
        return False
    if scan[end : end + 1] == "(" and _CALL.fullmatch(value):
        return True
    if _REFERENCE.fullmatch(value) or _TYPE.fullmatch(value):
        return True
    name = _OWN_NAME.search(scan, max(0, start - 80), start) if value.isidentifier() else None
    return name is not None and name[1] == value


def _is_basic(value: str) -> bool:
    """Whether a word behind `Basic` is what RFC 7617 wants there: user and password, in Base64."""
    try:
        decoded = base64.b64decode(value, validate=True).decode()
    except ValueError:
        return False
    user, colon, password = decoded.partition(":")
    return bool(user and colon and password) and decoded.isprintable()


def _is_digest(scan: str, start: int, value: str) -> bool:
    name = _DIGEST_NAME.search(scan, max(0, start - 8), start)
    return name is not None and len(value.rstrip("=")) in _DIGEST_CHARS[name[1]]


def _score(scan: str, start: int, end: int, rule_id: str, confidence: str) -> float:
    """A word unknown to us counts as the highest: better a finding too many than a failed request."""
    if rule_id in _PASSWORD_RULES:
        user = _NAME_EDGE.split(scan[max(0, start - 130) : start - 1])[-1]
        if scan[start:end] == user or _WELL_KNOWN.fullmatch(scan, start, end):
            return _SCORES["low"]
    return _SCORES.get(confidence, _SCORES["high"])


def _exact(scan: str, start: int, matches: list[_Match]) -> list[_Match]:
    """The matches that begin at `start` without those that took along what delimits the value.

    Views see a value end differently, since what delimits one key is part of another. The longest match of a rule
    counts, but: what begins behind a delimiter of Markdown or of a path ends before the next such one; a parameter of
    a query ends before the next parameter; and rules that know only the name before a value yield to those that know
    the value's form.
    """
    opening, ends = scan[max(0, start - 1) : start], {end for end, _, _ in matches}
    if opening == "=" and _QUERY_NAME.search(scan, max(0, start - 67), start):
        certain = {end for end in ends if scan[end : end + 1] in ("&", "#")}
    else:
        certain = {end for end in ends if opening in _PAIRED and scan[end : end + 1] == opening}
    known = {end for end, _, rule_id in matches if rule_id not in _BY_NAME}
    last = max(certain or known or ends)
    longest = {rule_id: (end, score, rule_id) for end, score, rule_id in sorted(matches) if end <= last}
    return list(longest.values())


def _findings(text: Text, found: list[tuple[int, int, float, str]]) -> list[Finding]:
    """One finding a span: that of the rule most certain of it."""
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for start, end, score, rule_id in found:
        best[start, end] = max((score, rule_id), best.get((start, end), (0.0, "")))
    return [
        Finding("secrets", "SECRET", *text.span(start, end), score, rule_id)
        for (start, end), (score, rule_id) in best.items()
    ]


def _trim(view: str, start: int, end: int) -> tuple[int, int]:
    """Some rules capture the delimiter after the secret too."""
    while end > start and view[end - 1] in BREAK_CHARS:
        end -= 1
    while start < end and view[start] in BREAK_CHARS:
        start += 1
    return start, end


def _ignored(rules: Rules) -> frozenset[str]:
    """The rules whose findings do not count.

    Raises:
        RuntimeError: the scanner may say something that we do not know, now rather than in the midst of a request.
    """
    details = [rules.detail(rule["id"]) for rule in rules.metadata()]
    words = {*get_args(get_type_hints(Rules.__init__)["confidence"]), *(detail["confidence"] for detail in details)}
    if unknown := words - _SCORES.keys():
        raise RuntimeError(f"the scanner knows confidence {sorted(unknown)}, we do not: check the kingfisher version")
    if gone := _LEFT_OUT - {detail["id"] for detail in details}:
        raise RuntimeError(f"the scanner has no rules {sorted(gone)} to leave out: check the kingfisher version")
    unusable = {
        detail["id"]
        for detail in details
        if not detail["visible"] or not all(companion["optional"] for companion in detail["depends_on_rule"])
    }
    return frozenset(unusable | _LEFT_OUT)


@functools.cache
def _engine() -> tuple[Rules, Scanner]:
    with resources.as_file(resources.files("aim_guardrail.detectors") / "secrets.yaml") as ours:
        rules = Rules([ours])
    if rules.cache_status == "bypassed":
        _LOG.warning("the secret rules were compiled without a cache: set KF_RULE_CACHE_DIR to save 5 s a start")
    return rules, Scanner(rules)
