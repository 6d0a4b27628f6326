"""Engines side by side: the same prompts to each, in turns, at temperature 0; how they differ in time and in text.

In turns, so that what else a machine does is everybody's; each round begins with another one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

from aim_kserve.tables import plain_table, show
from aim_profile.serving.evidence import Slo
from aim_runtime.measure.client import Client, Outcome
from aim_runtime.measure.errors import MeasureError
from aim_runtime.measure.figures import point
from aim_runtime.measure.levels import Load, Shape
from aim_runtime.measure.options import Options
from aim_runtime.measure.prompts import Prompts
from aim_runtime.measure.verb import ask_server, tokens_per_word, warm_up

#: Prompts of a round; the same ones each time would be answered out of a prefix cache.
_PER_ROUND = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One engine. ratio: its figure by the first one's; same_text: share of prompts answered word for word as there."""

    name: str
    engine: str
    answered: int
    failed: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    itl_p50_ms: float | None
    e2e_p50_ms: float | None
    tokens_per_s: float
    same_text: float
    ratios: Mapping[str, float | None]


class _Engine:
    def __init__(self, name: str, client: Client, model: str, kind: str) -> None:
        self.name, self.client, self.model, self.kind = name, client, model, kind
        self.outcomes: list[Outcome] = []
        self.busy_s = 0.0


async def compare(options: Options) -> int:
    """Raises MeasureError: fewer than two engines, or one of them is not there."""
    if len(options.compare) < 2:
        raise MeasureError(f"--compare {options.compare[0]}: give two or more, separated by commas", exit_code=2)
    async with AsyncExitStack() as stack:
        engines = [await _engine(text, options, stack) for text in options.compare]
        first = engines[0]
        prompts = Prompts(options.seed, await tokens_per_word(first.client, first.model))
        load = Load(
            prompts,
            Shape(options.prompt, options.output, options.prefix_tokens, options.prefixes),
            model=first.model,
            path=options.path,
            arrivals="closed",
            bursts=options.bursts,
            seed=options.seed,
        )
        for each in engines:
            await warm_up(each.client, _Named(load, each.model), options.warm_up)  # type: ignore[arg-type]
        await _rounds(engines, load, options)
    found = _rows(engines)
    _show(found, options, prompts.digest)
    return 0 if all(row.answered for row in found) else 1


class _Named:
    """The load under another engine's name of the model."""

    def __init__(self, load: Load, model: str) -> None:
        self._load, self._model, self.path = load, model, load.path

    def body(self) -> dict[str, Any]:
        return {**self._load.body(), "model": self._model}


async def _engine(text: str, options: Options, stack: AsyncExitStack) -> _Engine:
    name, equals, url = text.partition("=")
    if not name or (equals and not url.startswith(("http://", "https://"))):
        raise MeasureError(f"--compare {text}: give NAME=http://HOST:PORT, or a served name at --url", exit_code=2)
    client = Client(url if equals else options.url, timeout_s=options.timeout_s, key_file=options.key_file)
    await stack.enter_async_context(client)
    server = await ask_server(client, options.model if equals else name)
    return _Engine(name, client, server.model, f"{server.engine or 'unknown'} {server.version or ''}".strip())


async def _rounds(engines: Sequence[_Engine], load: Load, options: Options) -> None:
    at_once = int(options.levels[0]) if options.levels else 1
    loop = asyncio.get_running_loop()
    for number in range(options.rounds):
        bodies = [load.body() for _ in range(_PER_ROUND)]
        turn = number % len(engines)
        for each in (*engines[turn:], *engines[:turn]):
            began = loop.time()
            each.outcomes += await _ask_all(each, load.path, bodies, at_once)
            each.busy_s += loop.time() - began


async def _ask_all(engine: _Engine, path: str, bodies: Sequence[dict[str, Any]], at_once: int) -> list[Outcome]:
    free, loop = asyncio.Semaphore(at_once), asyncio.get_running_loop()

    async def one(body: dict[str, Any]) -> Outcome:
        async with free:
            return await engine.client.ask(path, {**body, "model": engine.model}, loop.time())

    return list(await asyncio.gather(*map(one, bodies)))


def _rows(engines: Sequence[_Engine]) -> list[Row]:
    made = [_row(each, engines[0]) for each in engines]
    return [Row(**{**_fields(row), "ratios": _ratios(row, made[0])}) for row in made]


_RATIOS = ("ttft_p50_ms", "itl_p50_ms", "e2e_p50_ms", "tokens_per_s")


def _ratios(row: Row, first: Row) -> dict[str, float | None]:
    pairs = {name: (getattr(row, name), getattr(first, name)) for name in _RATIOS}
    return {name: round(own / base, 3) if own is not None and base else None for name, (own, base) in pairs.items()}


def _fields(row: Row) -> dict[str, Any]:
    return asdict(row)


def _row(engine: _Engine, first: _Engine) -> Row:
    found = point(1.0, engine.outcomes, (), Slo(), began_s=0.0, least_s=0.001)
    same = [
        own.text == other.text
        for own, other in zip(engine.outcomes, first.outcomes, strict=True)
        if own.failed is None and other.failed is None
    ]
    return Row(
        name=engine.name,
        engine=engine.kind,
        answered=found.answered,
        failed=sum(found.failed.values()),
        ttft_p50_ms=found.ttft_ms.p50 if found.ttft_ms else None,
        ttft_p95_ms=found.ttft_ms.p95 if found.ttft_ms else None,
        itl_p50_ms=found.itl_ms.p50 if found.itl_ms else None,
        e2e_p50_ms=found.e2e_ms.p50 if found.e2e_ms else None,
        tokens_per_s=round(found.output_tokens / max(engine.busy_s, 1e-9), 3),
        same_text=round(sum(same) / len(same), 4) if same else 0.0,
        ratios={},
    )


def _show(found: Sequence[Row], options: Options, digest: str) -> None:
    right = ("answered", "failed", "TTFT p50 ms", "p95", "ITL p50 ms", "E2E p50 ms", "tokens/s", "same text")
    shown = plain_table(("name", "engine"), right)
    for row in found:
        figures = (
            (row.ttft_p50_ms, row.ratios["ttft_p50_ms"]),
            (row.ttft_p95_ms, None),
            (row.itl_p50_ms, row.ratios["itl_p50_ms"]),
            (row.e2e_p50_ms, row.ratios["e2e_p50_ms"]),
            (row.tokens_per_s, row.ratios["tokens_per_s"]),
        )
        counts = (str(row.answered), str(row.failed))
        shown.add_row(row.name, row.engine, *counts, *(_with_ratio(*each) for each in figures), f"{row.same_text:.0%}")
    show(shown)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    body = {"command": options.command, "prompts": digest, "rounds": options.rounds, "rows": [asdict(r) for r in found]}
    (options.output_dir / "compare.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _with_ratio(value: float | None, ratio: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" + (f" ({ratio:.2f}x)" if ratio is not None else "")
