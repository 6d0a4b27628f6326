"""``python -m aim_guardrail``: check what goes to a predictor and what comes back."""

from __future__ import annotations

import sys

from aim_kserve.signals import end_while_starting


def main() -> None:
    """Entry point of ``aim-guardrail``. Exit codes: 0 stopped, 1 cannot serve (policy, port), 2 wrong settings."""
    end_while_starting()  # before anything that takes its time to be imported
    from aim_guardrail.policy.source import PolicyError
    from aim_guardrail.settings import GuardrailSettings
    from aim_kserve.settings import SettingsError

    try:
        settings = GuardrailSettings.load(
            sys.argv[1:],
            prog="aim-guardrail",
            description="Guard any predictor's prompts and answers: OpenAI, KServe V1 and V2 (REST, gRPC).",
        )
    except SettingsError as error:
        sys.exit(_refuse(str(error), 2))
    try:
        policy = settings.read_policy()
    except PolicyError as error:
        sys.exit(_refuse(str(error), 1))
    from aim_guardrail.server import run  # imports KServe: settings are checked before that second is spent

    sys.exit(run(settings, policy))


def _refuse(reason: str, code: int) -> int:
    for line in reason.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
