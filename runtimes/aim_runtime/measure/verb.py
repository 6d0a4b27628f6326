"""`aim-runtime measure`: asks the server who it is, runs the load, writes evidence and plot, says what it says."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aim_profile.errors import AimProfileError
from aim_profile.serving.evidence import EngineRun, Measurement, Point
from aim_profile.serving.evidence import Load as LoadEvidence
from aim_profile.serving.evidence_files import EvidenceFile, as_text
from aim_profile.serving.files import read_file
from aim_profile.serving.profile import Profile
from aim_runtime.measure.client import Client
from aim_runtime.measure.errors import MeasureError
from aim_runtime.measure.figures import overload
from aim_runtime.measure.hardware import Found, hardware_of, places
from aim_runtime.measure.levels import Load, Shape, run_level
from aim_runtime.measure.options import Options, parse
from aim_runtime.measure.plot import draw, needs_matplotlib
from aim_runtime.measure.prompts import ESTIMATED_TOKENS_PER_WORD, Prompts, word_list
from aim_runtime.measure.rising import Rising
from aim_runtime.measure.trace import read_trace

#: Who owns a model's card → the engine that server is of.
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama_cpp"}
#: Left for what is on its way when the last level's sending ends.
_WAIT_SHARE = 0.5
_FEW = 100


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself. args: what it says of its engine's arguments."""

    model: str
    engine: str | None
    version: str | None
    args: Mapping[str, Any]
    metrics: str


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 measured; 1 the server cannot be measured, or no level is valid; 2 wrong arguments."""
    try:
        options = parse(argv)
        if options.compare:
            from aim_runtime.measure.engines_compared import compare

            return asyncio.run(compare(options))
        if options.plot:
            needs_matplotlib()
        return asyncio.run(measure(options))
    except MeasureError as error:
        _say(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("error: interrupted: nothing was written")
        return 130


async def measure(options: Options) -> int:
    """Raises MeasureError: what was asked for cannot be measured."""
    profile = _profile(options)
    trace = read_trace(options.trace) if options.trace else ()
    folder = _folder(options.output_dir)
    async with Client(options.url, timeout_s=options.timeout_s, key_file=options.key_file) as client:
        server = await ask_server(client, options.model)
        found = hardware_of(
            options.url,
            places(server.metrics, server.model),
            node=options.node,
            gpu_count=options.gpu_count,
            on_cpu=options.on_cpu or _engine(options, profile, server) == "llama_cpp",
        )
        prompts = Prompts(options.seed, await tokens_per_word(client, server.model))
        load = Load(
            prompts,
            Shape(options.prompt, options.output, options.prefix_tokens, options.prefixes),
            model=server.model,
            path=options.path,
            arrivals=options.arrivals,
            bursts=options.bursts,
            seed=options.seed,
            trace=trace,
        )
        date = datetime.now(UTC)
        await warm_up(client, load, options.warm_up)
        rising = await _rise(client, load, options)
    if not any(point.valid and point.answered for point in rising.points):
        raise MeasureError(f"no level is evidence: {_why_none(rising.points)}")
    made = _measurement(options, profile, server, found, rising, prompts, date)
    _write(folder, made, options)
    _tell(made, found, profile, folder, rising)
    return 0


async def _rise(client: Client, load: Load, options: Options) -> Rising:
    loop = asyncio.get_running_loop()
    end = loop.time() + options.max_s

    async def run(level: float) -> Point | None:
        if end - loop.time() < options.level_s:
            return None
        # A level that is more than the server holds must not take the time of those after it.
        until = min(end, loop.time() + options.level_s + max(options.timeout_s * _WAIT_SHARE, options.level_s))
        point = await run_level(client, load, level, options.level_s, options.slo, until_s=until)
        _say(_line(point, load.arrivals))
        return point

    rising = Rising(run, options.slo, whole=load.arrivals == "closed")
    if options.levels:
        await rising.listed(options.levels)
    else:
        await rising.until_the_knee(options.start)
    return rising


async def ask_server(client: Client, wanted: str | None) -> Server:
    """Raises MeasureError: nobody there, no model list, or not that model."""
    cards = await client.say("/v1/models")
    data = cards.get("data") if isinstance(cards, dict) else None
    if not isinstance(data, list) or not all(isinstance(card, dict) for card in data):
        raise MeasureError(f"--url {client.url}: /v1/models lists no models: give the address of an OpenAI server")
    by_name = {str(card.get("id")): card for card in data}
    if wanted is None and len(by_name) != 1:
        raise MeasureError(f"--model: there are {', '.join(by_name) or 'none'}: name one", exit_code=2)
    name = wanted if wanted is not None else next(iter(by_name))
    if name not in by_name:
        raise MeasureError(f"--model {name}: no such model here; there are: {', '.join(by_name) or 'none'}")
    return await _server(client, by_name[name], name)


async def _server(client: Client, card: Mapping[str, Any], name: str) -> Server:
    said = await client.say("/version")
    own = said if isinstance(said, dict) else {}
    models = own.get("models")
    own = models.get(name, own) if isinstance(models, dict) else own
    metrics = await client.say("/metrics")
    longest = card.get("max_model_len")
    engine = own.get("engine") or _OWNERS.get(str(card.get("owned_by")))
    return Server(
        model=name,
        engine=engine if isinstance(engine, str) else None,
        version=str(own["version"]) if own.get("version") else None,
        args={"max-model-len": longest} if isinstance(longest, int) else {},
        metrics=metrics if isinstance(metrics, str) else "",
    )


async def tokens_per_word(client: Client, model: str) -> float:
    """Of the bundled words, in this server's vocabulary; estimated where it has no `/tokenize`."""
    once, twice = " ".join(word_list()), " ".join(word_list() * 2)
    counts: list[int] = []
    for text in (once, twice):
        said = await client.say("/tokenize", {"model": model, "prompt": text})
        if not isinstance(said, dict) or not isinstance(said.get("count"), int):
            return ESTIMATED_TOKENS_PER_WORD
        counts.append(said["count"])
    # The difference leaves out what a text has once: the token that begins it.
    return max(0.1, (counts[1] - counts[0]) / len(word_list()))


async def warm_up(client: Client, load: Load, number: int) -> None:
    """Requests that do not count, one after another. Raises MeasureError where even the first is not answered."""
    loop = asyncio.get_running_loop()
    for index in range(number):
        outcome = await client.ask(load.path, load.body(), loop.time())
        if index == 0 and outcome.failed:
            raise MeasureError(f"the first request was not answered: {outcome.failed} from {load.path}")


def _profile(options: Options) -> Profile | None:
    try:
        return read_file(options.profile) if options.profile else None
    except AimProfileError as error:
        raise MeasureError(f"--profile {error}", exit_code=2) from None


def _engine(options: Options, profile: Profile | None, server: Server) -> str:
    return options.engine or server.engine or (profile.metadata.engine if profile else "unknown")


def _measurement(
    options: Options,
    profile: Profile | None,
    server: Server,
    found: Found,
    rising: Rising,
    prompts: Prompts,
    date: datetime,
) -> Measurement:
    points = tuple(rising.points)
    asked = sum(point.answered + sum(point.failed.values()) for point in points)
    of_trace = options.trace is not None
    return Measurement(
        version=1,
        model=options.model_id or (profile.aim_id if profile else None) or server.model,
        served_as=server.model,
        precision=options.precision or (profile.metadata.precision if profile else None),
        hardware=found.hardware,
        engine=EngineRun(name=_engine(options, profile, server), version=server.version, args=server.args),
        load=LoadEvidence(
            generator="aim-runtime measure",
            arrivals=options.arrivals,  # type: ignore[arg-type]  # one of ARRIVALS, or trace
            prompt_tokens="trace" if of_trace else options.prompt.text,
            output_tokens="trace" if of_trace else options.output.text,
            shared_prefix_tokens=0 if of_trace else options.prefix_tokens,
            prompts=prompts.digest,
            trace=options.trace.name if options.trace else None,
            seed=options.seed,
            warm_up=options.warm_up,
            requests=asked,
            duration_s=round(sum(point.duration_s for point in points), 3),
        ),
        slo=options.slo,
        points=points,
        knee=rising.knee,
        command=options.command,
        date=date.replace(microsecond=0),
        tool=f"aim-kserve {_own_version()}",
    )


def _own_version() -> str:
    try:
        return version("aim-kserve")
    except PackageNotFoundError:
        return "unknown"


def _folder(folder: Path) -> Path:
    """The folder, made where it is not there: before the load, not after. Raises MeasureError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeasureError(
            f"--output {folder}: {error.strerror}: name a folder that can be made", exit_code=2
        ) from None
    return folder


def _write(folder: Path, made: Measurement, options: Options) -> None:
    file = EvidenceFile(measurements=(made,))
    texts = {
        "evidence.yaml": as_text([made]),
        "evidence.json": file.model_dump_json(indent=2, exclude_none=True) + "\n",
    }
    try:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if options.plot:
            draw(made, [folder / f"plot.{ending}" for ending in options.plot])
    except OSError as error:
        raise MeasureError(f"--output {folder}: {error.strerror}") from None


def _tell(made: Measurement, found: Found, profile: Profile | None, folder: Path, rising: Rising) -> None:
    knee = made.knee
    _say(f"knee: {knee.offered:g} ({knee.because})" if knee else f"knee: not reached{_why_not(rising)}")
    _say(f"written: {folder}/evidence.yaml")
    if made.headline.answered < _FEW:
        _say(f"{made.headline.answered} requests were answered at that level: under {_FEW} say little of p99")
    if found.note:
        _say(f"hardware unknown: {found.note}; this evidence speaks for no profile")
    elif made.precision is None:
        _say("precision unknown: give --precision or --profile, or this evidence speaks for no profile")
    elif profile is not None and (other := made.mismatch(profile.subject)):
        _say(f"not evidence of {profile.reference}: {other}")


def _why_not(rising: Rising) -> str:
    if rising.out_of_time:
        return ": --max-seconds ran out"
    if rising.points and not rising.points[-1].valid:
        return ": this client could not keep up with more"
    why = overload(rising.points[0], rising.slo)
    return f": the lowest level is beyond it ({why})" if why else ""


def _why_none(points: Sequence[Point]) -> str:
    if not points:
        return "--max-seconds is less than --level-seconds: give more"
    kinds = sorted({kind for point in points for kind in point.failed})
    if not any(point.answered for point in points):
        return f"no request was answered ({', '.join(kinds) or 'none was sent: give a higher rate or longer levels'})"
    return "the client could not keep up (its own lag is in the points): ask for less, or run it on another machine"


def _line(point: Point, arrivals: str) -> str:
    unit = "clients" if arrivals == "closed" else "requests/s"
    first, between = point.ttft_ms, point.itl_ms
    figures = [
        f"{point.offered:g} {unit}: {point.requests_per_s:.3g} answered/s, {point.output_tokens_per_s:.4g} tokens/s",
        f"TTFT p50 {first.p50:.4g} p95 {first.p95:.4g} ms" if first else "",
        f"ITL p95 {between.p95:.4g} ms" if between else "",
        f"goodput {point.goodput_per_s:.3g}/s" if point.goodput_per_s is not None else "",
        ", ".join(f"{count} {kind}" for kind, count in point.failed.items()),
        "" if point.valid else f"INVALID: the client was {point.client_lag_ms:.4g} ms late at p95",
    ]
    return ", ".join(part for part in figures if part)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201  what a person reads while it runs
