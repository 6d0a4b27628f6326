"""The runtime and a transformer before it, closed to those without a credential; and a credential for each case."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aim_kserve.identity import keys as key_file
from guarded import guardrail
from issuer import Issuer
from otlp_receiver import OtlpReceiver
from served import Served

SCOPES = ("infer", "admin", "metrics", "filter")
CASES = ("no key", "wrong key", "expired", "wrong audience", "wrong scope", "right")


def bearer(text: str) -> dict[str, str]:
    """The header, or metadata, of a key or token."""
    return {"authorization": f"Bearer {text}"}


class Credentials:
    """One for each case and scope, in a key file of their own.

    Attributes:
        texts: of keys by id: ``infer`` has that scope, ``no-infer`` all others; ``expired``; ``wrong`` is none.
        token: of the right issuer, for others.
    """

    def __init__(self, file: Path, issuer: Issuer) -> None:
        self.file = file
        self.token = issuer.token(aud="others", scope=" ".join(SCOPES))
        every: Any = SCOPES
        made = {scope: key_file.new_key(scope, tenant="t", scopes=[scope]) for scope in every}
        for lacking in SCOPES:
            others = [scope for scope in every if scope != lacking]
            made[f"no-{lacking}"] = key_file.new_key(f"no-{lacking}", tenant="t", scopes=others)
        ended = datetime.now(UTC) - timedelta(days=1)
        made["expired"] = key_file.new_key("expired", tenant="t", scopes=every, expires=ended)
        self.texts = {name: text for name, (text, _) in made.items()}
        self.texts["wrong"] = key_file.new_key("infer", tenant="t")[0]  # of that id, and another secret
        key_file.write(file, key_file.KeyFile(keys=tuple(entry for _, entry in made.values())))

    def of(self, case: str, scopes: frozenset[str]) -> dict[str, str]:
        """The header for a route that needs ``scopes``, one or none."""
        if case == "no key":
            return {}
        (scope,) = scopes or {"infer"}
        named = {"wrong key": "wrong", "expired": "expired", "wrong scope": f"no-{scope}", "right": scope}
        return bearer(self.token if case == "wrong audience" else self.texts[named[case]])


@dataclass(frozen=True)
class ClosedPair:
    """``servers``: ``runtime`` and ``transformer``; ``traces``: the runtime's."""

    servers: dict[str, Served]
    credentials: Credentials
    issuer: Issuer
    traces: OtlpReceiver


@contextlib.contextmanager
def closed_pair(folder: Path) -> Iterator[ClosedPair]:
    """Models ``m`` (with the adapter ``polite``) and ``other``; ``c`` is known and not loaded. Both verify: the
    transformer hands the credential on."""
    with Issuer() as issuer, OtlpReceiver() as traces:
        credentials = Credentials(folder / "keys.yaml", issuer)
        closed = ["--api_keys", str(credentials.file), *issuer.flags()]
        flags = ["--runtime_adapters", "true", "--otlp_endpoint", traces.url]
        models = {"m": {"engine": {"adapters": ["polite"]}}, "other": {}, "c": {"at_start": False}}
        with Served.fake_models(*flags, *closed, models=models) as runtime:
            forwarding = ("--predictor_credentials", "forward", "--predictor_grpc_host", runtime.grpc_url)
            own = folder / "own"
            own.write_text(credentials.texts["infer"])
            asking = ("--enable_predictor_health_check", "true", "--predictor_api_key_file", str(own))
            with guardrail(f"127.0.0.1:{runtime.http_port}", *forwarding, *asking, *closed) as transformer:
                yield ClosedPair({"runtime": runtime, "transformer": transformer}, credentials, issuer, traces)
