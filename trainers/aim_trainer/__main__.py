"""`python -m aim_trainer`, and the console script `aim-trainer`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line; ends the process."""
    # `aim-trainer preview | head` ends like any other filter.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Libraries' own bars would fill a log with half-lines; set it to 0 to see them.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from aim_trainer.cli.app import app

    app(prog_name="aim-trainer")


if __name__ == "__main__":
    main()
