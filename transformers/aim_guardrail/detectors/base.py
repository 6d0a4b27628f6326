"""What every detector agrees on: `Finding`, and the two protocols.

A `Detector` is synchronous, thread-safe and cheap (well under a millisecond for a chat message): it runs inline, on
every prompt and on every released piece of an answer. What is not cheap (classifiers, remote judges) is a
`BatchDetector`: it is awaited, takes whole texts in batches and keeps a deadline. Those run behind the inline stage,
after it has blocked or redacted what it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from aim_guardrail.text import Text


class Finding(NamedTuple):
    """One detected value. It says where and what, never the value itself.

    `start` and `end` are code points of the original text (end exclusive); `score` is 0..1.

    Attributes:
        detector: the id of the rule whose detector found it; "" where its family alone tells.
        action: what the policy does about it; "" until `policy.decide` has said so.
    """

    family: str
    label: str
    start: int
    end: int
    score: float
    rule_id: str
    detector: str = ""
    action: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """A kind of value: the score from which it counts by default, and the highest score it can reach."""

    threshold: float
    top_score: float


class Detector(Protocol):
    """Finds values of one family in a text, inline.

    Contract, relied upon by the streaming guard: whether a value is found, and its span, depends only on the
    unit it lies in (see `aim_guardrail.text.units`), on at most `text.CONTEXT_CHARS` characters before that
    unit and on the one character after it. So a finding never crosses a unit's edge.
    """

    @property
    def family(self) -> str:
        """A key of `families.FAMILIES`."""

    @property
    def labels(self) -> frozenset[str]:
        """The labels this instance looks for."""

    def may_find(self, scan: str) -> bool:
        """Whether these whole units (folded) could hold a value: a cheap test without false negatives."""

    def scan(self, text: Text, since: int = 0) -> list[Finding]:
        """The values in `text` that end after `since`, an index of `text.scan` between units; in any order,
        overlaps allowed. What lies before `since` is left context only.
        """


@dataclass(frozen=True, slots=True)
class Passage:
    """One whole text for a `BatchDetector`: a slot's, or that of parts which are read as one.

    Attributes:
        role: who says it, as its message has it (`user`, `system`, `tool`, …); "" outside messages.
        key: what names it, "" where nothing does.
    """

    text: str
    direction: Literal["prompt", "answer"]
    role: str = ""
    key: str = ""

    @property
    def is_indirect(self) -> bool:
        """Whether it was not written by whoever asks: what a tool, a function or a document says."""
        return self.role in _INDIRECT


_INDIRECT = frozenset(["tool", "function", "document", "ipython"])


@dataclass(frozen=True, slots=True)
class Asked:
    """What a `BatchDetector` is told beside the passages.

    Attributes:
        deadline_s: when its answer is of no use any more, by ``time.monotonic``.
        prompt: what was asked, where the passages are of an answer; else empty.
        tenant: whose request it is, "" where nobody says: what is remembered is never shared between tenants.
    """

    deadline_s: float
    prompt: Sequence[Passage] = ()
    tenant: str = ""


class BatchDetector(Protocol):
    """Judges whole texts; awaited, behind the inline stage.

    It must not block the event loop (a model runs in a thread, see `threads`), must give up by itself when it is
    cancelled, and its finding on a passage never depends on the passages beside it.
    """

    @property
    def family(self) -> str:
        """A key of `families.FAMILIES`."""

    @property
    def cost(self) -> Literal["model", "remote"]:
        """Whether it computes here or asks elsewhere."""

    @property
    def digest(self) -> str:
        """Changes whenever what it finds may: of its model and its options. Part of a cached verdict's key."""

    @property
    def cacheable(self) -> bool:
        """Whether its findings on a passage follow from that passage alone: they may then be remembered."""

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        """The findings of each passage, all scores, below any threshold too.

        Raises:
            Misconfigured: its answer would be the same for any text (a 401, a model that is not served).
            Unjudged: it is this text that gets no answer.
            Exception: whatever failed: the policy's `on_error` decides.
        """

    async def close(self) -> None:
        """Give back what it holds (connections, threads)."""


class Misconfigured(Exception):
    """A detector cannot work as it is configured: nothing passes, whatever the policy says of errors. One line."""


class Unjudged(Exception):
    """This text cannot be judged (too long, or what a judge said of it cannot be read): an error as any other to a
    policy, but no sign that the detector fails with others' texts. One line.
    """
