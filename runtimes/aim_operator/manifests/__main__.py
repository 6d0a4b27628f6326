"""`python -m aim_operator.manifests FOLDER [--check]`: makes manifests/crds and manifests/operator anew, or says what
would change."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aim_operator.manifests.folder import folders
from aim_profile.errors import AimProfileError


def main() -> None:
    """Exits 1 where --check finds a difference, or a folder holds what is not ours."""
    parser = argparse.ArgumentParser(prog="python -m aim_operator.manifests", description=__doc__)
    parser.add_argument("folder", type=Path, help="manifests/")
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args()
    found = []
    try:
        for name, made in folders().items():
            folder = asked.folder / name
            found += [f"{folder}/{line}" for line in (made.drift(folder) if asked.check else made.write(folder))]
    except (AimProfileError, OSError) as error:
        sys.exit(f"error: {error}")
    print(*found, sep="\n", end="\n" if found else "")
    if found and asked.check:
        sys.exit("manifests are not as they are made: make manifests, and commit what it changed")


if __name__ == "__main__":
    main()
