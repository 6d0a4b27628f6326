"""`python -m aim_operator.read_node`: what the node's own files say of its partitions, into the termination log."""

from __future__ import annotations

import sys
from pathlib import Path

from aim_profile.errors import AimProfileError

from .partitions.read_back import as_message, read_here

_TERMINATION_LOG = Path("/dev/termination-log")


def main(log: Path = _TERMINATION_LOG, root: Path = Path("/")) -> int:
    """The exit code: 0 where it could be read, else 1 with the reason in the log."""
    try:
        text, code = as_message(read_here(root)), 0
    except AimProfileError as problem:
        text, code = str(problem), 1
    log.write_text(text, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
