"""``python -m aim_runtime``: serve one model, or several."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from aim_kserve.signals import end_while_starting

_WHAT = (
    "Serve one model, or those of a file (--models), over OpenAI's API and KServe V1 and V2 (REST, gRPC). "
    "'aim-runtime compare SOURCE' puts the variants of a served name side by side; 'aim-runtime keys' makes, lists and "
    "revokes API keys; 'aim-runtime cache' fetches models, verifies and keeps them; 'aim-runtime batch' "
    "has a file of requests answered; 'aim-runtime measure' runs load on a server and writes evidence."
)


def main() -> None:
    """Entry point of ``aim-runtime``. Exit codes: 0 stopped, 1 cannot serve, 2 wrong settings."""
    end_while_starting()  # before anything that takes its time to be imported
    if sys.argv[1:2] == ["compare"]:
        from aim_runtime.compare import main as compare

        _as_a_filter()
        sys.exit(compare(sys.argv[2:]))
    if sys.argv[1:2] == ["keys"]:
        from aim_runtime.keys import main as keys

        _as_a_filter()
        sys.exit(keys(sys.argv[2:]))
    if sys.argv[1:2] == ["cache"]:
        from aim_runtime.cache.verbs import main as cache

        sys.exit(cache(sys.argv[2:]))
    if sys.argv[1:2] == ["batch"]:
        from aim_runtime.batch.command import main as batch

        sys.exit(batch(sys.argv[2:]))
    if sys.argv[1:2] == ["measure"]:
        from aim_runtime.measure.verb import main as measure

        sys.exit(measure(sys.argv[2:]))
    from aim_kserve.settings import SettingsError
    from aim_runtime.settings import RuntimeSettings

    try:
        settings = RuntimeSettings.load(sys.argv[1:], prog="aim-runtime", description=_WHAT)
    except SettingsError as error:
        sys.exit(_refuse(str(error)))
    if settings.dry_run:
        from aim_runtime.dry_run import dry_run

        _as_a_filter()
        sys.exit(dry_run(settings))
    from aim_runtime.server import run

    sys.exit(run(settings))


def _as_a_filter() -> None:
    """``… | head`` ends what prints and serves nothing like any other filter."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _refuse(reason: str) -> int:
    """Settings are wrong, and the one that says where Kubernetes looks may be among them: its variable counts."""
    from aim_runtime.device_settings import TERMINATION_LOG
    from aim_runtime.start import say

    given = os.environ.get("AIM_TERMINATION_LOG")
    say(reason, Path(given or TERMINATION_LOG), create=bool(given))
    return 2


if __name__ == "__main__":
    main()
