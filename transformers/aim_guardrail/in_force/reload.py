"""Reload: the policies' files are looked at while requests go on, and what has changed comes into force whole or not.

A look costs a `stat` a file, in a thread of its own: this works on every volume (a ConfigMap's mount, which swaps one
link; NFS and overlays, which tell nobody of a change).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from aim_guardrail.in_force.generation import Generation
from aim_guardrail.in_force.policies import Policies
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import DetectorFailed
from aim_guardrail.policy import PolicyError, PolicySet
from aim_guardrail.policy.directory import policy_files
from aim_kserve.identity.files import Follower, Signature, signature

logger = logging.getLogger("aim.policy")

Seen = tuple[tuple[str, Signature | None], ...]


class Reload:
    """Keeps the policies in force those of the files.

    Args:
        paths: files and directories that are looked at.
        read: gives what they say now. Raises PolicyError.
        every_s: seconds between looks. A change is read once two looks have seen the same: a file that is being
            written may be valid, and mean less, at its half.
    """

    def __init__(
        self,
        paths: list[Path],
        read: Callable[[], PolicySet],
        policies: Policies,
        metrics: Metrics,
        every_s: float,
    ) -> None:
        self._paths, self._read, self._policies, self._metrics = paths, read, policies, metrics
        self._last: Seen | None = None
        self._known: Seen | None = None
        self._follower = Follower("policy-reload", self._look, every_s=every_s)

    def start(self) -> None:
        """Begin to look; on the event loop, once policies are in force."""
        self._loop = asyncio.get_running_loop()
        self._follower.start()

    def stop(self) -> None:
        """Look no more."""
        self._follower.stop()

    def _look(self) -> None:
        seen = self._seen()
        if seen != self._last:
            self._last = seen
        elif seen != self._known:
            self._known = seen
            self._reload()

    def _seen(self) -> Seen:
        try:
            files = [file for path in self._paths for file in policy_files(path)]
        except PolicyError:  # reading will say why
            files = []
        return tuple((str(file), signature(file)) for file in files)

    def _reload(self) -> None:
        """Read, compile and try; what comes of it is put in force on the event loop."""
        current = self._policies.current
        try:
            policies = self._read()
            if (current is not None and policies == current.policies) or self._seen() != self._known:
                return  # what is changing even now is read when it has settled
            generation = Generation.load(policies, current)
            asyncio.run_coroutine_threadsafe(self._policies.put_in_force(generation), self._loop).result()
        except PolicyError as error:
            self._metrics.reloaded("invalid")
            logger.error("policies are not reloaded, those in force stay: %s", error)
        except DetectorFailed as error:
            self._metrics.reloaded("failed")
            logger.error("policies are not reloaded, those in force stay: %s", error)
        else:
            self._metrics.reloaded("ok")
            logger.info("policies reloaded: %s", ", ".join(policy.label for policy in policies))
