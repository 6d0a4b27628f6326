"""What `aim-runtime measure` is asked: its flags, checked before anything is sent."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args
from urllib.parse import urlsplit

from aim_profile.serving.evidence import AimPrecision, Slo
from aim_runtime.measure.arrivals import OnOff
from aim_runtime.measure.errors import MeasureError
from aim_runtime.measure.lengths import FORMS, MOST_TOKENS, Lengths, lengths

DESCRIPTION = (
    "Load on a live OpenAI-compatible server, rising to its knee, and what came of it as evidence with a plot."
)
ARRIVALS = ("poisson", "on-off", "closed")
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MOST_LEVELS = 64
_MOST_CLIENTS = 4096


@dataclass(frozen=True, slots=True)
class Options:
    """levels: requests per second, or clients, empty: found by doubling from start. model_id, engine, precision: None
    where they were not said. command: what was typed, without the address."""

    url: str
    model: str | None
    model_id: str | None
    engine: str | None
    precision: Any
    profile: Path | None
    node: Path | None
    gpu_count: int | None
    on_cpu: bool
    key_file: Path | None
    path: str
    arrivals: str
    bursts: OnOff
    levels: tuple[float, ...]
    start: float
    prompt: Lengths
    output: Lengths
    prefix_tokens: int
    prefixes: int
    trace: Path | None
    seed: int
    warm_up: int
    level_s: float
    max_s: float
    timeout_s: float
    slo: Slo
    output_dir: Path
    plot: tuple[str, ...]
    compare: tuple[str, ...]
    rounds: int
    command: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MeasureError(message, exit_code=2)


def parse(argv: Sequence[str]) -> Options:
    """Raises MeasureError (exit code 2) naming the flag, the value and the remedy."""
    given = _parser().parse_args(argv)
    closed = given.arrivals == "closed"
    if given.rates and given.concurrency:
        raise _wrong("concurrency", given.concurrency, "give --rates (open loop) or --concurrency (closed loop)")
    if given.concurrency or closed:
        if given.rates:
            raise _wrong("rates", given.rates, "a closed loop has --concurrency")
        if given.trace:
            raise _wrong("trace", given.trace, "a trace is an open loop: leave --concurrency and closed out")
        given.arrivals = "closed"
    if given.trace:
        given.arrivals = "trace"
    whole = given.arrivals == "closed"
    levels = _levels(given.concurrency or given.rates, "concurrency" if given.concurrency else "rates", whole=whole)
    return Options(
        url=_url(given.url),
        model=given.model,
        model_id=given.model_id,
        engine=given.engine,
        precision=given.precision,
        profile=given.profile,
        node=given.node,
        gpu_count=given.gpu_count,
        on_cpu=given.on_cpu,
        key_file=given.api_key_file,
        path=PATHS[given.endpoint],
        arrivals=given.arrivals,
        bursts=OnOff(given.on_s, given.off_s),
        levels=levels,
        start=float(math.ceil(given.start)) if whole else given.start,
        prompt=lengths(given.prompt_tokens, "prompt-tokens"),
        output=lengths(given.output_tokens, "output-tokens"),
        prefix_tokens=given.shared_prefix_tokens,
        prefixes=given.prefixes,
        trace=given.trace,
        seed=given.seed,
        warm_up=given.warm_up,
        level_s=given.level_seconds,
        max_s=given.max_seconds,
        timeout_s=given.timeout_seconds,
        slo=Slo(ttft_ms=given.slo_ttft_ms, itl_ms=given.slo_itl_ms),
        output_dir=given.output,
        plot={"none": (), "both": ("png", "svg")}.get(given.plot, (given.plot,)),
        compare=tuple(part.strip() for part in given.compare.split(",")) if given.compare else (),
        rounds=given.rounds,
        command=_command(argv),
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="aim-runtime measure", description=DESCRIPTION, allow_abbrev=False)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--url", required=True, metavar="URL", help="http://HOST:PORT of the server")
    what.add_argument("--model", metavar="NAME", help="served name; needed where the server has several")
    what.add_argument("--model-id", metavar="ORG/MODEL", help="what profiles call it; default: the served name")
    what.add_argument(
        "--profile", type=Path, metavar="FILE", help="profile it is served by: says id, engine, precision"
    )
    what.add_argument("--engine", metavar="NAME", help="where the server does not say it")
    what.add_argument("--precision", choices=get_args(AimPrecision), help="of the weights, which no server says")
    what.add_argument("--node", type=Path, metavar="FILE", help="the server's machine (aim-profile node export)")
    what.add_argument("--gpu-count", type=_whole(1, 8), metavar="N", help="devices, where the server does not say")
    what.add_argument("--on-cpu", action="store_true", help="it computes on processors, GPUs or not")
    what.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the key that is sent")
    what.add_argument("--endpoint", choices=tuple(PATHS), default="completions")
    load = parser.add_argument_group("load")
    load.add_argument("--arrivals", choices=ARRIVALS, default="poisson", help="default: poisson")
    load.add_argument("--on-s", type=_positive, default=5.0, metavar="S", help="on-off: seconds of a burst")
    load.add_argument("--off-s", type=_positive, default=5.0, metavar="S", help="on-off: seconds between bursts")
    load.add_argument("--rates", metavar="R,R,…", help="requests per second; default: doubled until the knee")
    load.add_argument("--concurrency", metavar="N,N,…", help="closed loop: so many clients, each waits for its answer")
    load.add_argument("--start", type=_positive, default=1.0, metavar="R", help="first level, where none are listed")
    load.add_argument("--prompt-tokens", default="constant:128", metavar="D", help=FORMS)
    load.add_argument("--output-tokens", default="constant:32", metavar="D", help="the same, of answers")
    load.add_argument("--shared-prefix-tokens", type=_whole(0, MOST_TOKENS), default=0, metavar="N", help="of a prompt")
    load.add_argument("--prefixes", type=_whole(1, 10**6), default=1, metavar="N", help="so many different ones")
    load.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines: t, prompt_tokens, output_tokens, prefix")
    load.add_argument("--seed", type=_whole(0, 2**31), default=1, metavar="N")
    load.add_argument("--warm-up", type=_whole(0, 10_000), default=3, metavar="N", help="requests that do not count")
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--level-seconds", type=_positive, default=20.0, metavar="S", help="a level sends for so long")
    bounds.add_argument("--max-seconds", type=_positive, default=300.0, metavar="S", help="of all levels together")
    bounds.add_argument("--timeout-seconds", type=_positive, default=120.0, metavar="S", help="of one request")
    bounds.add_argument("--slo-ttft-ms", type=_positive, metavar="MS", help="a good answer's first token comes by then")
    bounds.add_argument("--slo-itl-ms", type=_positive, metavar="MS", help="and its others that far apart, on average")
    out = parser.add_argument_group("what is written")
    out.add_argument("--output", type=Path, default=Path("evidence"), metavar="DIR", help="default: evidence/")
    out.add_argument("--plot", choices=("both", "png", "svg", "none"), default="both")
    side = parser.add_argument_group("several engines side by side")
    side.add_argument("--compare", metavar="A,B", help="NAME=URL, or served names at --url: the same prompts to each")
    side.add_argument("--rounds", type=_whole(1, 1000), default=3, metavar="N", help="in turns")
    return parser


def _wrong(flag: str, value: object, remedy: str) -> MeasureError:
    return MeasureError(f"--{flag} {value}: {remedy}", exit_code=2)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _whole(least: int, most: int) -> Any:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text[:20]) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most:,}")
        return int(text)

    return read


def _levels(text: str | None, flag: str, *, whole: bool) -> tuple[float, ...]:
    if not text:
        return ()
    read = _whole(1, _MOST_CLIENTS) if whole else _positive
    try:
        found = tuple(float(read(part.strip())) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise _wrong(flag, text, f"{error}") from None
    if len(found) > _MOST_LEVELS:
        raise _wrong(flag, text[:40], f"{len(found)} levels: give at most {_MOST_LEVELS}")
    return found


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_one = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_one:
        raise _wrong("url", text, "give http://HOST:PORT")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise _wrong("url", "…", "give an address alone; a key goes into a file (--api-key-file)")
    return text.rstrip("/")


def _command(argv: Sequence[str]) -> str:
    """As it was typed, but for where the server is and where files are: evidence is for strangers."""
    hidden, kept, hide = {"--url", "--api-key-file", "--output", "--node", "--profile"}, [], False
    for part in argv:
        name, equals, _ = part.partition("=")
        kept.append("…" if hide else f"{name}=…" if equals and name in hidden else part)
        hide = part in hidden
    return shlex.join(["aim-runtime", "measure", *kept])
