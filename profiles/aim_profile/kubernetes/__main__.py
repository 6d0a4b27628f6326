"""`python -m aim_profile.kubernetes FOLDER [--check]`: makes manifests/ anew, or says what would change.

With `--monitoring` its folder monitoring/, which others of it know nothing of: dashboards take Grafana's builders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aim_profile.errors import AimProfileError

from .generated import MARK, Generated
from .manifests import generated


def main() -> None:
    """Exits 1 where --check finds a difference, or the folder holds what is not ours."""
    parser = argparse.ArgumentParser(prog="python -m aim_profile.kubernetes", description=__doc__)
    parser.add_argument("folder", type=Path, help="manifests/")
    parser.add_argument("--monitoring", action="store_true", help="FOLDER is manifests/monitoring")
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args()
    try:
        made = _monitoring() if asked.monitoring else generated()
        found = made.drift(asked.folder) if asked.check else made.write(asked.folder)
    except (AimProfileError, OSError) as error:
        sys.exit(f"error: {error}")
    for line in found:
        print(f"{asked.folder}/{line}")
    if found and asked.check:
        sys.exit("manifests are not as they are made: make manifests, and commit what it changed")


def _monitoring() -> Generated:
    from .monitoring.folder import files

    return Generated(files(MARK))


if __name__ == "__main__":
    main()
