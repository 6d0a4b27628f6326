"""``python -m aim_guardrail``: check what goes to a predictor and what comes back."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import NamedTuple

from aim_kserve.signals import end_while_starting


class _Verb(NamedTuple):
    """module: its ``main(argv)`` returns the exit code."""

    module: str
    what: str


_VERBS = {
    "check": _Verb("aim_guardrail.cli.check", "one text through a policy, as the server would check it"),
    "catalog": _Verb("aim_guardrail.cli.catalog", "the families a policy can name, and the shipped policies"),
    "policy": _Verb("aim_guardrail.cli.policy", "validate policies, explain one, print their schema"),
    "eval": _Verb("aim_guardrail.cli.evaluate", "how good a policy's families are on labelled texts"),
    "audit": _Verb("aim_guardrail.cli.audit", "whether an audit is as it was written"),
    "bench": _Verb("aim_guardrail.cli.bench", "what a policy's rules cost on this machine"),
}
_WHAT = "\n".join(
    (
        "Guard any predictor's prompts and answers: OpenAI, KServe V1 and V2 (REST, gRPC).",
        "Or do one thing and end:",
        "",
        *(f"  aim-guardrail {name:<8} {verb.what}" for name, verb in _VERBS.items()),
        "",
        "Each of these has --help of its own. What follows are the server's settings.",
    )
)


def main() -> None:
    """Entry point of ``aim-guardrail``. Exit codes: 0 stopped, 1 cannot serve (policy, port), 2 wrong settings."""
    end_while_starting()  # before anything that takes its time to be imported
    first = sys.argv[1] if len(sys.argv) > 1 else "--"
    if verb := _VERBS.get(first):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it like any other filter
        sys.exit(importlib.import_module(verb.module).main(sys.argv[2:]))
    from aim_guardrail.policy.source import PolicyError
    from aim_guardrail.settings import GuardrailSettings
    from aim_kserve.settings import SettingsError

    try:
        if not first.startswith("-"):
            raise SettingsError(f"{first!r} is no verb: give {', '.join(_VERBS)}, or settings (--model_name NAME …)")
        settings = GuardrailSettings.load(sys.argv[1:], prog="aim-guardrail", description=_WHAT)
    except SettingsError as error:
        sys.exit(_refuse(str(error), 2))
    try:
        policies = settings.read_policies()
    except PolicyError as error:
        sys.exit(_refuse(str(error), 1))
    from aim_guardrail.server import run  # imports KServe: settings are checked before that second is spent
    from aim_kserve.errors import StartupError

    try:
        sys.exit(run(settings, policies))
    except StartupError as error:
        sys.exit(_refuse(str(error), 1))


def _refuse(reason: str, code: int) -> int:
    for line in reason.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
