"""`python -m aim_profile.kubernetes FOLDER [--check]`: makes manifests/ anew, or says what would change."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aim_profile.errors import AimProfileError

from .manifests import drift, write


def main() -> None:
    """Exits 1 where --check finds a difference, or the folder holds what is not ours."""
    parser = argparse.ArgumentParser(prog="python -m aim_profile.kubernetes", description=__doc__)
    parser.add_argument("folder", type=Path, help="manifests/")
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args()
    try:
        found = drift(asked.folder) if asked.check else write(asked.folder)
    except (AimProfileError, OSError) as error:
        sys.exit(f"error: {error}")
    for line in found:
        print(f"{asked.folder}/{line}")
    if found and asked.check:
        sys.exit("manifests are not as they are made: make manifests, and commit what it changed")


if __name__ == "__main__":
    main()
