"""``python -m aim_runtime``: serve one model, or several."""

from __future__ import annotations

import signal
import sys

from aim_kserve.settings import SettingsError
from aim_kserve.signals import end_while_starting
from aim_runtime.settings import RuntimeSettings

_WHAT = (
    "Serve one model, or those of a file (--models), over OpenAI's API and KServe V1 and V2 (REST, gRPC). "
    "'aim-runtime compare SOURCE' puts the variants of a served name side by side."
)


def main() -> None:
    """Entry point of ``aim-runtime``. Exit codes: 0 stopped, 1 cannot serve, 2 wrong settings."""
    end_while_starting()
    if sys.argv[1:2] == ["compare"]:
        from aim_runtime.compare import main as compare

        _as_a_filter()
        sys.exit(compare(sys.argv[2:]))
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
    for line in reason.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
