"""Where a process says what it does. Imports nothing heavy: it comes before what does."""

from __future__ import annotations

import logging
import sys

#: Loggers that tell of every request what the access log tells.
NOISY = ("kserve", "uvicorn", "httpx")


def log_to_stderr(level: int = logging.INFO) -> None:
    """Plain lines on stderr for what the process does; requests go to the JSON access log on stdout."""
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
