"""Before it is ready an engine answers once, and where nobody vouches for it, makes sense."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from aim_kserve.errors import BadRequest
from aim_runtime.assignment import Assignment, Basis
from aim_runtime.engines.base import Engine, Json, ModelLoadError, Operation, RequestContext
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.self_check import LEAST_CERTAINTY, MOST_PERPLEXITY, PROMPT, proof, self_check, warm_up
from aim_runtime.server import prove_of
from aim_runtime.settings import RuntimeSettings
from served import Served

VOCABULARY = 49152


class Scored:
    """An engine whose log probabilities and text are given: the operations are all that the check looks at."""

    name = "scored"
    max_model_len = 8192

    def __init__(self, logprob: object = -1.0, likeliest: object = -0.5, text: str = " 8, 9, 10, 11") -> None:
        self.logprob, self.likeliest, self.text = logprob, likeliest, text
        self.asked: list[Json] = []

    @property
    def operations(self) -> Mapping[str, Operation]:
        return {"completions": self._complete}

    async def _complete(self, body: Json, _: RequestContext) -> Json:
        self.asked.append(body)
        if not body.get("echo"):
            return {"choices": [{"text": self.text}]}
        count = 20
        tokens = [None, *[self.logprob] * count, -9.0]
        top = [None, *[{"a": self.likeliest}] * count, {"a": -9.0}]
        return {"choices": [{"text": "…", "logprobs": {"token_logprobs": tokens, "top_logprobs": top}}]}


def check(**scores: Any) -> Any:
    return asyncio.run(self_check(cast(Engine, Scored(**scores)), "m"))


def test_a_plausible_model_passes() -> None:
    found = check()
    assert found.perplexity == pytest.approx(math.e)
    assert found.certainty == pytest.approx(math.exp(-0.5))
    assert found.text == " 8, 9, 10, 11"


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"logprob": -math.log(VOCABULARY)}, "perplexity 49152, above 500"),
        ({"logprob": math.nan}, "not numbers"),
        ({"logprob": None}, "not numbers"),
        ({"logprob": -math.inf}, "not numbers"),
        ({"logprob": 3.0}, "not numbers"),
        ({"likeliest": math.nan}, "not numbers"),
        ({"likeliest": -math.log(VOCABULARY)}, "every token is equally likely"),
        ({"text": ""}, "is not text: ''"),
        ({"text": "\ufffd\ufffd\x00\x01 a"}, "is not text"),
        ({"text": "!" * 16}, "one character over and over"),
    ],
)
def test_garbage_is_refused(scores: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        check(**scores)
    assert says in str(refused.value)
    assert "--self_check=never" in str(refused.value)


def test_a_request_that_fails_is_a_load_that_failed() -> None:
    class Failing(Scored):
        async def _complete(self, body: Json, _: RequestContext) -> Json:
            raise BadRequest("echo: not here")

    for asked in (warm_up, self_check):
        with pytest.raises(ModelLoadError, match="the first request fails: echo: not here"):
            asyncio.run(asked(cast(Engine, Failing()), "m"))


def test_what_has_no_completions() -> None:
    class Embedding(Scored):
        @property
        def operations(self) -> Mapping[str, Operation]:
            return {"embeddings": self._complete}

    engine = Embedding()
    assert asyncio.run(warm_up(cast(Engine, engine), "m")) >= 0
    assert engine.asked == [{"model": "m", "input": PROMPT}]
    needed, wanted = (proof("m", warm=False, check=True, needed=needed) for needed in (True, False))
    assert needed
    assert wanted
    asyncio.run(_none(wanted(cast(Engine, engine))))
    with pytest.raises(ModelLoadError, match="no completions"):
        asyncio.run(_none(needed(cast(Engine, engine))))


async def _none(proving: Any) -> None:
    await proving


@pytest.mark.parametrize(
    ("flags", "unproven", "asked"),
    [
        ([], False, 1),
        ([], True, 3),
        (["--self_check", "always"], False, 3),
        (["--self_check", "never"], True, 1),
        (["--warm_up", "false"], True, 2),
        (["--warm_up", "false"], False, None),
    ],
)
def test_who_is_asked_what(flags: list[str], unproven: bool, asked: int | None) -> None:
    settings = RuntimeSettings.load(flags, {}, prog="p", description="")
    basis = Basis(node="emulated", unproven=unproven)
    prove = prove_of(settings, Assignment(engine="vllm", model="m", model_dir=Path("/m"), evidence=basis))
    engine = Scored()
    if prove is not None:
        asyncio.run(_none(prove(cast(Engine, engine))))
    assert (None if prove is None else len(engine.asked)) == asked


@pytest.mark.model
async def test_a_real_model_passes_with_room_to_spare(embedded_model: Path) -> None:
    short = LlamaCppEngine(embedded_model, served_model_name="m", max_model_len=16, threads=1)
    await short.load()
    try:
        assert await warm_up(short, "m") == 0  # no room for it is no reason not to serve
    finally:
        await short.close()
    engine = LlamaCppEngine(embedded_model, served_model_name="m", max_model_len=512, threads=1)
    await engine.load()
    try:
        found = await self_check(engine, "m")
    finally:
        await engine.close()
    assert 1 < found.perplexity < MOST_PERPLEXITY / 20
    assert found.certainty > 10 * LEAST_CERTAINTY
    assert " 8" in found.text
    print(found)


@pytest.mark.model
def test_the_log_of_a_start_tells_both(embedded_model: Path) -> None:
    flags = ["--model_name", "m", "--model_dir", str(embedded_model), "--threads", "1", "--max_model_len", "512"]
    with Served(["-m", "aim_runtime", *flags, "--self_check", "always"]) as server:
        log = server.stderr()
        assert "model m: warmed up in " in log
        assert "model m: self-check passed, perplexity " in log
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200


GARBAGE = """
import asyncio, sys
sys.path[:0] = {paths!r}
from aim_runtime.models.entry import Launch
from aim_runtime.self_check import proof
from aim_runtime.server import serve
from aim_runtime.settings import RuntimeSettings
from fake_engine import FakeEngine

class Garbage(FakeEngine):
    async def _complete(self, body, context):
        tokens, top = [None, *[-10.8] * 20, -9], [None, *[{{"a": -10.8}}] * 20, None]
        logprobs = {{"token_logprobs": tokens, "top_logprobs": top}}
        return {{"choices": [{{"text": "!" * 16, "logprobs": logprobs}}]}}

settings = RuntimeSettings.load(sys.argv[1:], {{}}, prog="p", description="")
engine = Garbage("m")
sys.exit(serve(settings, engine, Launch(lambda: engine, prove=proof("m", warm=True, check=True))))
"""


def test_garbage_ends_the_process_with_one_line_and_never_is_ready(tmp_path: Path) -> None:
    fakes = Path(__file__).parents[1] / "fakes"
    flags = ["--model_name", "m", "--http_port", "0", "--grpc_port", "0", "--host", "127.0.0.1"]
    script = GARBAGE.format(paths=[str(fakes)])
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: model m: self-check: a known sentence has perplexity 49021, above 500: ")
    assert "Traceback" not in done.stderr
    assert "model m: ready" not in done.stderr
