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

import functools
import logging
import re
from importlib import resources

from kingfisher_sdk import Rules, Scanner

from aim_guardrail.detectors.base import Finding
from aim_guardrail.text import BREAK_CHARS, BREAKS, PRIVATE_KEY, Text

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
_URI_RULES = frozenset({"betterleaks.generic-credential-uri", "aim.uri-password"})
_LONG_RUN = re.compile(f"[^{BREAKS}]{{8,}}")
_DIGIT = re.compile("[0-9]")
# Most rules want a quote, whitespace or ; behind a secret: fine in code, but in an answer it may be followed by any
# punctuation. After something as long as a secret such punctuation is shown to the rules as a ; in a second pass.
_SOFT_END = re.compile(r"(?<=[A-Za-z0-9_=/+-]{16})(?:[,)\]}<>|(]|[.:!?](?=[\s\"',;<>()\[\]{}`|]|\Z))")
_SCORES = {"high": 0.9, "medium": 0.6}


class SecretDetector:
    """Finds secrets. Loading blocks for 0.5-5 s; scanning releases the GIL and is thread-safe."""

    family = "secrets"
    labels = frozenset({"SECRET"})

    def __init__(self) -> None:
        self._rules, self._scanner = _engine()
        self._verdicts: dict[str, bool] = {}
        # Not a key, but shaped like one. Should the rules not have loaded as we know them, say so at start-up.
        canary = Text("AKIA" + "Q3EGRBL7JX2VWP5M")
        if len(self.scan(canary)) != 1:
            raise RuntimeError("the secret rules do not find a known sample: check the kingfisher version")

    def may_find(self, scan: str) -> bool:
        """A secret is at least 8 characters with a digit, or at least 16, or a URI's password."""
        if "://" in scan or "-----" in scan:
            return True
        return any(len(run) >= 16 or _DIGIT.search(run) for run in _LONG_RUN.findall(scan))

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        """Secrets that end after `since`. About 15 us for a chat message."""
        spans: dict[tuple[int, int], tuple[float, str]] = {}
        matches = self._scanner.scan(text.scan)
        if _SOFT_END.search(text.scan):
            matches += self._scanner.scan(_SOFT_END.sub(";", text.scan))
        for match in matches:
            where = match.location
            start, end = _trim(text.scan, where["start_offset"], where["end_offset"])
            if end > since and self._counts(match.rule_id) and _is_secret(text.scan[start:end], match.rule_id):
                best = (_SCORES[match.confidence], match.rule_id)
                spans[start, end] = max(best, spans.get((start, end), best))
        if "-----" in text.scan:
            for block in PRIVATE_KEY.finditer(text.scan, since):
                spans[block.span()] = (_SCORES["high"], "aim.private-key")
        return [
            Finding("secrets", "SECRET", *text.span(start, end), score, rule_id)
            for (start, end), (score, rule_id) in spans.items()
        ]

    def _counts(self, rule_id: str) -> bool:
        known = self._verdicts.get(rule_id)
        if known is None:
            detail = self._rules.detail(rule_id)
            alone = all(companion["optional"] for companion in detail["depends_on_rule"])
            known = self._verdicts[rule_id] = detail["visible"] and alone and rule_id not in _LEFT_OUT
        return known


def warm_cache() -> str:
    """Compile the rules into the cache (for image builds). Returns the outcome: stored, loaded or bypassed."""
    return str(_engine()[0].cache_status)


def _is_secret(value: str, rule_id: str) -> bool:
    """Besides passwords in URIs, nothing short, no plain words and no plain numbers."""
    if rule_id in _URI_RULES:
        return True
    return (len(value) >= 16 or (len(value) >= 8 and _DIGIT.search(value) is not None)) and not value.isdigit()


def _trim(scan: str, start: int, end: int) -> tuple[int, int]:
    """Some rules capture the delimiter after the secret too."""
    while end > start and scan[end - 1] in BREAK_CHARS:
        end -= 1
    while start < end and scan[start] in BREAK_CHARS:
        start += 1
    return start, end


@functools.cache
def _engine() -> tuple[Rules, Scanner]:
    with resources.as_file(resources.files("aim_guardrail.detectors") / "secrets.yaml") as ours:
        rules = Rules([ours])
    if rules.cache_status == "bypassed":
        _LOG.warning("the secret rules were compiled without a cache: set KF_RULE_CACHE_DIR to save 5 s a start")
    return rules, Scanner(rules)
