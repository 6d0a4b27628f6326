"""``aim-runtime cache``: models fetched once, verified, and kept on a volume (docs/cache.md)."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from aim_kserve.tables import plain_table, show
from aim_profile.errors import AimProfileError
from aim_profile.units import duration_s, gib, parse_memory
from aim_runtime.cache import AIM_CACHE
from aim_runtime.cache.add import Added, Options, add, present
from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.fetch import Effort
from aim_runtime.cache.index import Cache, Entry
from aim_runtime.cache.locks import unused
from aim_runtime.cache.progress import shown
from aim_runtime.cache.prune import prune, size_bytes
from aim_runtime.cache.stats import read_stats
from aim_runtime.cache.uri import parse_uri
from aim_runtime.cache.verify import verify

_LEAVES_AFTER_S = 2.0
_ENDED = "ended; what has been fetched stays, and the next add goes on with it"


def main(argv: Sequence[str]) -> int:
    """Entry point. Exit codes: 0; 1 it could not be done, or something is damaged; 2 wrong arguments (argparse)."""
    given = _parser().parse_args(argv)
    leaving = threading.Timer(_LEAVES_AFTER_S, _leave)
    leaving.daemon = True

    def ended(*_: object) -> NoReturn:
        """SIGTERM as Ctrl-C. A connection that is silent is not waited for; locks are held until the process ends."""
        if leaving.ident is None:
            leaving.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, ended) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = int(given.verb(_cache(given), given))
        sys.stdout.flush()
        return code
    except CacheError as error:
        return _refused(str(error))
    except BrokenPipeError:  # … | head: sources make errors of their own of theirs
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _refused(f"{error.filename or given.cache}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _refused(_ENDED)
    finally:
        leaving.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _cache(given: argparse.Namespace) -> Cache:
    """Says of entries that nobody can read. Raises CacheError: it is no directory, or not there where it should be."""
    root: Path = given.cache
    if root.exists() and not root.is_dir():
        raise CacheError(f"{root}: is no directory: give --cache the directory of the cache")
    if not root.is_dir() and given.verb not in (_add, _prefetch):
        raise CacheError(f"{root}: no such directory: give --cache the directory of the cache")
    cache = Cache(root)
    for said in cache.unreadable().values():
        sys.stderr.write(f"{_printable(said)}\n")
    return cache


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _leave() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor that a bar hides
    _refused(_ENDED)
    sys.stderr.flush()
    os._exit(1)


def _say(line: str) -> None:
    print(line)  # noqa: T201  the command's own output


def _refused(reason: str) -> int:
    sys.stderr.write(f"error: {_printable(reason)}\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aim-runtime cache", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, does: Callable[[Cache, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(verb=does)
        default = Path(os.environ.get("AIM_CACHE_PATH") or AIM_CACHE)
        made.add_argument(
            "--cache", type=_directory, default=default, metavar="DIR", help=f"the volume (default: {default})"
        )
        made.add_argument("-o", "--output", choices=("text", "json"), default="text")
        return made

    one = verb("add", _add, "fetch a model, or have it as it is now at its source")
    one.add_argument(
        "source", metavar="SOURCE", help="path, file://, http(s)://, s3://, hf://ORG/NAME[@REVISION], oci://"
    )
    one.add_argument("--name", help="its id in the cache; default: ORG/NAME, or the source's last part")
    several = verb("prefetch", _prefetch, "fetch those of several models that are not here; no network where all are")
    several.add_argument("sources", nargs="+", metavar="SOURCE")
    for each in (one, several):
        _fetching(each)
    verb("list", _list, "what is here")
    check = verb("verify", _verify, "hash what is here again; exit 1 if something is damaged")
    check.add_argument("models", nargs="*", metavar="MODEL", help="ids; default: all")
    check.add_argument("--quick", action="store_true", help="look at sizes only")
    check.add_argument("--parallel", type=_whole, default=4, metavar="N", help="files hashed at once (default: 4)")
    less = verb("prune", _prune, "make room: least recently used first; never pinned ones, never what a server uses")
    less.add_argument("--max-size", type=_size, metavar="SIZE", help="what the cache may hold, as in 500GiB")
    less.add_argument("--max-age", type=_age, metavar="AGE", help="not used for so long, as in 30d, 12h")
    less.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    verb("stats", _stats, "size, hit rate, bytes fetched and saved")
    return parser


def _fetching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include", action="append", default=[], metavar="PATTERN", help="instead of what serving needs"
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave out")
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, help="prune never removes it")
    parser.add_argument("--parallel", type=_whole, default=4, metavar="N", help="files fetched at once (default: 4)")
    parser.add_argument(
        "--retries", type=_whole, default=6, metavar="N", help="attempts without a new byte (default: 6)"
    )
    parser.add_argument(
        "--stall", type=_seconds, default=60.0, metavar="S", help="seconds without a byte (default: 60)"
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=3600.0,
        metavar="S",
        help="seconds for another process to be done (default: 3600)",
    )


def _directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'': give the directory of the cache")
    return Path(text)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: give a whole number from 1 to 64")
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,3})?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: give seconds, as in 60")
    return float(text)


def _size(text: str) -> int:
    try:
        return parse_memory(text)
    except AimProfileError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: {error.remedy}") from None


def _age(text: str) -> float:
    age_s = duration_s(text)
    if age_s is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: give a number and s, m, h, d or w, as in 30d")
    return float(age_s)


def _options(given: argparse.Namespace, name: str | None = None) -> Options:
    return Options(
        name=name,
        include=tuple(given.include),
        exclude=tuple(given.exclude),
        pin=given.pin,
        wait_s=given.wait,
        stall_s=given.stall,
        effort=Effort(given.parallel, given.retries),
    )


def _add(cache: Cache, given: argparse.Namespace) -> int:
    added = add(cache, parse_uri(given.source), _options(given, given.name), shown())
    _print_added(cache, [added], given.output)
    return 0


def _prefetch(cache: Cache, given: argparse.Namespace) -> int:
    uris = [parse_uri(source) for source in given.sources]  # all of them are looked at before the first is fetched
    options = _options(given)
    found = [present(cache, uri, options) or add(cache, uri, options, shown()) for uri in uris]
    _print_added(cache, found, given.output)
    return 0


def _print_added(cache: Cache, found: Sequence[Added], output: str) -> None:
    if output == "json":
        rows = [
            {
                **_row(cache, each.entry),
                "hit": each.hit,
                "fetched_bytes": each.fetched_bytes,
                "reused_bytes": each.reused_bytes,
            }
            for each in found
        ]
        _say(json.dumps(rows, indent=2))
        return
    for each in found:
        how = "was here" if each.hit else f"{gib(each.fetched_bytes)} GiB fetched"
        _say(f"{each.entry.name}: {how}: {cache.link(each.entry.name)}")


def _row(cache: Cache, entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "source": entry.source,
        "revision": entry.revision,
        "state": entry.state if cache.content(entry.key).is_dir() else "missing",
        "current": cache.is_current(entry),
        "pinned": entry.pinned,
        "files": len(entry.files),
        "size_bytes": entry.size_bytes,
        "fetched_at": entry.fetched_at,
        "last_used": cache.last_used(entry),
        "path": str(cache.content(entry.key)),
    }


def _list(cache: Cache, given: argparse.Namespace) -> int:
    rows = [_row(cache, entry) for entry in cache.entries()]
    if given.output == "json":
        _say(json.dumps(rows, indent=2))
        return 0
    table = plain_table(("name", "GiB", "state", "revision", "last used", "source"))
    for row in rows:
        marks = [row["state"], *(["pinned"] if row["pinned"] else []), *([] if row["current"] else ["not current"])]
        revision = row["revision"].removeprefix("sha256:")[:12] or "-"
        table.add_row(
            row["name"], str(gib(row["size_bytes"])), ", ".join(marks), revision, _day(row["last_used"]), row["source"]
        )
    show(table)
    return 0


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _verify(cache: Cache, given: argparse.Namespace) -> int:
    entries = _named(cache.entries(), given.models)
    found = verify(cache, entries, quick=given.quick, at_once=given.parallel, watching=shown())
    if given.output == "json":
        _say(
            json.dumps([{"name": each.entry.name, "key": each.entry.key, "bad": each.bad} for each in found], indent=2)
        )
    else:
        for each in found:
            _say(f"{each.entry.name}: {'damaged' if each.bad else 'whole'}")
            for path, wrong in each.bad.items():
                _say(f"  {path}: {wrong}")
            if each.bad:
                _say(f"  no server finds it now: aim-runtime cache add {each.entry.source} --cache {cache.root}")
    return 1 if any(each.bad for each in found) or (not given.models and cache.unreadable()) else 0


def _named(entries: Iterable[Entry], names: Sequence[str]) -> list[Entry]:
    known = list(entries)
    for name in names:
        if name not in {entry.name for entry in known}:
            raise CacheError(f"{name[:100]!r} is not in the cache: aim-runtime cache list shows what is")
    return [entry for entry in known if not names or entry.name in names]


def _prune(cache: Cache, given: argparse.Namespace) -> int:
    outcome = prune(cache, max_size_bytes=given.max_size, max_age_s=given.max_age, dry_run=given.dry_run)
    if given.output == "json":
        rows = [{"name": each.name, "size_bytes": each.size_bytes, "why": each.why} for each in outcome.pruned]
        _say(json.dumps({"pruned": rows, "kept": outcome.kept, "size_bytes": outcome.size_bytes}, indent=2))
    else:
        for each in outcome.pruned:
            _say(
                f"{'would remove' if given.dry_run else 'removed'} {each.name}: {gib(each.size_bytes)} GiB ({each.why})"
            )
        for key, why in outcome.kept.items():
            _say(f"kept {key}: {why}")
        _say(f"the cache {'would hold' if given.dry_run else 'holds'} {gib(outcome.size_bytes)} GiB")
    if given.max_size is not None and outcome.size_bytes > given.max_size:
        raise CacheError(f"{gib(outcome.size_bytes)} GiB are left, more than --max-size: the rest is in use or pinned")
    return 0


def _stats(cache: Cache, given: argparse.Namespace) -> int:
    entries, known = cache.entries(), read_stats(cache)
    figures: dict[str, Any] = {
        "entries": len(entries),
        "pinned": sum(entry.pinned for entry in entries),
        "in_use": sum(_in_use(cache, entry) for entry in entries),
        "size_bytes": size_bytes(cache),
        "free_bytes": shutil.disk_usage(cache.root).free,
        "hits": known.hits,
        "misses": known.misses,
        "hit_rate": known.hit_rate,
        "fetched_bytes": known.fetched_bytes,
        "saved_bytes": known.saved_bytes,
    }
    if given.output == "json":
        _say(json.dumps(figures, indent=2))
        return 0
    for name, value in figures.items():
        amount = f"{gib(value)} GiB" if name.endswith("_bytes") else "-" if value is None else f"{value:.3g}"
        _say(f"{name.removesuffix('_bytes').replace('_', ' '):10} {amount}")
    return 0


def _in_use(cache: Cache, entry: Entry) -> bool:
    try:
        with unused(cache.lease(entry.key)) as free:
            return not free
    except CacheError:  # a volume that is mounted to be read only
        return False
