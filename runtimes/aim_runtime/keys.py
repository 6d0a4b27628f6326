"""``aim-runtime keys``: make, list and revoke the API keys of a key file (docs/identity.md).

``new`` prints the key once, alone on stdout; the file keeps its hash. What people should know goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from aim_kserve.errors import StartupError
from aim_kserve.identity import keys
from aim_kserve.identity.caller import QosClass, Scope
from aim_kserve.log import printable
from aim_kserve.settings import Parser
from aim_kserve.tables import plain_table, show
from aim_profile.units import duration_s

#: A key that ends within this time is marked.
SOON = timedelta(days=14)
_TIME = "give a time from now (12h, 90d) or a date and time with its zone (2027-01-31T00:00:00Z)"


def expiry(text: str, now: datetime) -> datetime:
    """When ``90d`` is over, or the time that is written out.

    Raises:
        ValueError: it is neither, or already past; one line.
    """
    span_s = duration_s(text)
    try:
        when = datetime.fromisoformat(text) if span_s is None else now + timedelta(seconds=span_s)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time: {_TIME}") from None
    if when.tzinfo is None:
        raise ValueError(f"{text!r} has no zone: {_TIME}")
    if when <= now:
        raise ValueError(f"{text!r} is past: {_TIME}")
    return when.astimezone(UTC).replace(microsecond=0)


def state(key: keys.ApiKey, now: datetime) -> str:
    """``valid``, ``soon`` (it ends within ``SOON``), ``expired``, ``not yet``."""
    if key.has_expired(now):
        return "expired"
    if key.not_before is not None and now < key.not_before:
        return "not yet"
    return "soon" if key.expires is not None and key.expires - now <= SOON else "valid"


def fresh_id(tenant: str) -> str:
    """An id that says whose key it is: the tenant's letters and digits, and eight random ones."""
    word = re.sub(r"[^a-z0-9]+", "-", tenant.lower())[:48].strip("-")
    return "-".join(filter(None, (word, secrets.token_hex(4))))


def main(argv: Sequence[str]) -> int:
    """Entry point. Exit codes: 0, 1 the file or a value in it, 2 wrong arguments (argparse)."""
    given = _arguments(argv)
    try:
        given.do(given)
    except StartupError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)  # noqa: T201  the command's own output
        return 1
    return 0


def _new(given: argparse.Namespace) -> None:
    text, entry = keys.new_key(
        given.id or fresh_id(given.tenant),
        tenant=given.tenant,
        scopes=given.scopes,
        qos_class=given.qos_class,
        models=given.models,
        expires=given.expires,
        note=given.note,
    )
    keys.add(given.file, entry)
    until = f"valid until {entry.expires:%Y-%m-%dT%H:%M:%SZ}" if entry.expires else "valid until it is revoked"
    _say(f"{entry.id}: {until}; the key follows on stdout, this once: {given.file} keeps its hash only")
    print(text)  # noqa: T201


def _list(given: argparse.Namespace) -> None:
    now = datetime.now(UTC)
    held = keys.read(given.file).keys
    if given.output == "json":
        without = set() if given.hashes else {"hash"}
        print(json.dumps([_plain(key, now, without) for key in held], indent=2))  # noqa: T201
        return
    show(_table(held, now, hashes=given.hashes))


def _revoke(given: argparse.Namespace) -> None:
    gone = keys.revoke(given.file, given.id)
    _say(f"{gone.id} (tenant {gone.tenant}) is no longer in {given.file}: servers refuse it once they have read it")


def _plain(key: keys.ApiKey, now: datetime, without: set[str]) -> dict[str, Any]:
    return {**key.model_dump(mode="json", by_alias=True, exclude=without), "state": state(key, now)}


def _table(held: Sequence[keys.ApiKey], now: datetime, *, hashes: bool) -> Table:
    names = ("id", "tenant", "class", "scopes", "models", "expires", "state", "note", *(("hash",) if hashes else ()))
    shown = plain_table(names)
    for key in held:
        expires = f"{key.expires:%Y-%m-%dT%H:%M:%SZ}" if key.expires else "never"
        models = "all" if key.models is None else ",".join(key.models)
        row = (key.id, key.tenant, key.qos_class or "-", ",".join(key.scopes), models, expires, state(key, now))
        shown.add_row(*row, printable(key.note or ""), *((key.hash,) if hashes else ()))
    return shown


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="aim-runtime keys", description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="new|list|revoke")
    new = _verb(verbs, "new", _new, "make a key; prints it once")
    new.add_argument("--tenant", required=True, help="who pays: fairness and limits are by tenant")
    new.add_argument("--id", help="its name in logs and metrics; default: the tenant and eight random digits")
    new.add_argument(
        "--class",
        dest="qos_class",
        choices=get_args(QosClass),
        help="the highest class of service it may ask for; default: the model's own",
    )
    new.add_argument(
        "--scopes",
        type=_scopes,
        default=("infer",),
        help=f"comma-separated, of {', '.join(get_args(Scope))}; default: infer",
    )
    new.add_argument("--models", nargs="+", metavar="PATTERN", help="names it may use (chat, team-*); default: all")
    new.add_argument("--expires", type=_expires, metavar="TIME", help="12h, 90d, 2027-01-31T00:00:00Z; default: never")
    new.add_argument("--note", metavar="TEXT", help="for people")
    shown = _verb(verbs, "list", _list, "show the keys: never their texts, which nobody has")
    shown.add_argument("-o", "--output", choices=("text", "json"), default="text")
    shown.add_argument("--hashes", action="store_true", help="show the hashes, too")
    _verb(verbs, "revoke", _revoke, "take a key out of the file").add_argument("id", metavar="ID")
    return parser.parse_args(argv)


def _verb(verbs: Any, name: str, do: Any, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=what, description=what, allow_abbrev=False)
    parser.add_argument("--file", required=True, type=Path, help="the key file (YAML, or JSON by its name)")
    parser.set_defaults(do=do)
    return parser


def _scopes(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for scope in found:
        if scope not in get_args(Scope):
            raise argparse.ArgumentTypeError(f"{scope!r} is no scope: give some of {', '.join(get_args(Scope))}")
    return found


def _expires(text: str) -> datetime:
    try:
        return expiry(text, datetime.now(UTC))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
