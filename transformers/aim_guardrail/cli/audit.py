"""``aim-guardrail audit verify``: whether an audit is as it was written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from aim_guardrail.audit.chain import MAX_LINE_BYTES, Broken, Last, verified
from aim_guardrail.cli.given import parser, run
from aim_guardrail.cli.refused import Refused
from aim_kserve.identity.key_file import read_key


def main(argv: Sequence[str]) -> int:
    arguments = parser("audit", "Verify audits (--audit_file): exit 0 if none of their lines was changed, else 1.")
    verbs = arguments.add_subparsers(dest="verb", required=True, metavar="verify")
    verify = verbs.add_parser("verify", help="name the first line that is not as it was written")
    verify.add_argument("files", nargs="+", metavar="FILE", type=Path, help="in the order in which they were written")
    verify.add_argument("--key_file", "--key-file", metavar="FILE", type=Path, help="the server's --audit_key_file")
    return run(_verify, arguments, argv)


def _verify(given: argparse.Namespace) -> int:
    key = None if given.key_file is None else _key(given.key_file)
    last: Last | None = None
    for file in given.files:
        try:
            count, last = verified(_lines(file), key, last)
        except Broken as error:
            sys.stdout.write(f"{file}: broken: {error}\n")
            return 1
        except OSError as error:
            raise Refused(f"{file}: cannot be read ({error.strerror}): give an audit's file") from error
        sys.stdout.write(f"{file}: {count} lines, unbroken up to line {last.seq} of the chain, {last.digest}\n")
    return 0


def _key(file: Path) -> bytes:
    try:
        return read_key(file)
    except ValueError as error:
        raise Refused(f"--key_file {file}: {error}") from None


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        while line := lines.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise Refused(f"{file}: has a line of more than {MAX_LINE_BYTES} bytes: it is no audit")
            yield line
