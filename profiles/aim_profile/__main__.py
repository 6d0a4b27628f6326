"""`python -m aim_profile`, and the console script `aim-profile`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; ends the process."""
    # `aim-profile list | head` ends like any other filter.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    from aim_profile.cli.app import app

    app(prog_name="aim-profile")


if __name__ == "__main__":
    main()
