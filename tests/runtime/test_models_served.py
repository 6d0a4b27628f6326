"""``--models``: several models, each engine in a process of its own on its own CPU set."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from served import Served

pytestmark = pytest.mark.model
WEDGED = Path(__file__).parents[1] / "fakes/wedged_runtime.py"
ASK = [{"role": "user", "content": "Name a colour."}]


def write(folder: Path, model: Path, text: str, program: Sequence[str] = ("-m", "aim_runtime")) -> list[str]:
    cpus = sorted(os.sched_getaffinity(0))
    node, models = folder / "node.yaml", folder / "models.yaml"
    sets = [{"cpus": [cpus[index % len(cpus)]], "memory": "1GiB"} for index in range(2)]
    node.write_text(f"version: 1\nkind: cpu\npartitions: {sets}\n".replace("'", '"'))
    models.write_text(f"version: 1\nmodels:\n{text}".replace("MODEL", str(model)))
    return [*program, "--models", str(models), "--node", str(node)]


@pytest.fixture(scope="module")
def served(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``one`` and ``two`` on a CPU set each; ``three`` would need one of them; ``both`` shares requests out."""
    options = "max_model_len: 512, max_concurrency: 2, options: {threads: 1, kv_cache_memory_bytes: 67108864}"
    text = f"""\
- {{name: one, path: MODEL, aliases: [first], {options}}}
- {{name: two, path: MODEL, priority: low, {options}}}
- {{name: three, path: MODEL, load: on_demand, {options}}}
- {{name: both, variants: {{one: 50, two: 50}}}}
"""
    with Served(write(tmp_path_factory.mktemp("models"), embedded_model, text)) as server:
        yield server


def complete(server: Served, model: str) -> httpx.Response:
    body = {"model": model, "messages": ASK, "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def engines(server: Served) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children()


def test_each_answers_by_its_name(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert [card.id for card in client.models.list()] == ["one", "first", "two", "both"]
    texts = {
        name: client.chat.completions.create(model=name, messages=ASK, max_tokens=4, temperature=0)
        .choices[0]
        .message.content
        for name in ("one", "first", "two", "both")
    }
    assert len(set(texts.values())) == 1  # the same file
    assert len(engines(served)) == 2
    metrics = httpx.get(f"{served.url}/metrics").text
    assert 'replica="card 0 partition 0"' in metrics
    assert 'replica="card 0 partition 1"' in metrics


def test_what_does_not_fit_is_refused_until_another_leaves(served: Served) -> None:
    def post(verb: str, name: str) -> httpx.Response:
        return httpx.post(f"{served.url}/v2/repository/models/{name}/{verb}", timeout=60)

    refused = post("load", "three")
    assert refused.status_code == 409
    assert refused.json()["error"].endswith("1.0 GiB short, model one has card 0 partition 0: unload it first")
    assert post("unload", "one").status_code == 200
    assert post("load", "three").status_code == 200
    assert complete(served, "three").status_code == 200
    assert complete(served, "one").status_code == 404
    assert post("unload", "three").status_code == 200
    assert post("load", "one").status_code == 200


def test_a_killed_engine_costs_the_other_model_nothing(served: Served) -> None:
    stop, statuses = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            statuses.append(complete(served, "two").status_code)

    pid = next(process.pid for process in engines(served) if process.cpu_affinity() == [_cpu(0)])
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(ask) for _ in range(2)]
        os.kill(pid, signal.SIGKILL)
        served.wait_status("/v2/models/one/ready", 503)
        down = complete(served, "one")
        live = httpx.get(f"{served.url}/v2/health/live").status_code
        served.wait_status("/v2/models/one/ready", 200)
        stop.set()
        for worker in workers:
            worker.result()
    assert (down.status_code, live) == (503, 200)
    assert down.json()["error"]["code"] == "engine_restarting"
    assert set(statuses) == {200}
    assert complete(served, "one").status_code == 200


def test_a_request_that_wedges_one_engine_costs_the_other_model_nothing(embedded_model: Path, tmp_path: Path) -> None:
    options = "max_model_len: 512, options: {threads: 1, stall_timeout: 2}"
    text = f"- {{name: one, path: MODEL, {options}}}\n- {{name: two, path: MODEL, {options}}}\n"
    with Served(write(tmp_path, embedded_model, text, [str(WEDGED)])) as server, ThreadPoolExecutor(1) as pool:
        wedge = {"model": "one", "prompt": "hi", "response_format": {"type": "json_object"}}
        wedged = pool.submit(httpx.post, f"{server.url}/v1/completions", json=wedge, timeout=60)
        statuses = []
        while not wedged.done():
            statuses.append(complete(server, "two").status_code)
        assert wedged.result().status_code == 503
        assert len(statuses) > 2
        assert set(statuses) == {200}
        server.wait_status("/v2/models/one/ready", 200)
        assert complete(server, "one").status_code == 200
        restarts = _restarts(server)
    assert restarts == {"one": 1, "two": 0}


def _restarts(server: Served) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == "aim_engine_restarts_total"]
    return {sample.labels["model_name"]: sample.value for sample in samples}


def _cpu(partition: int) -> int:
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[partition % len(cpus)]


def test_sigterm_ends_all_within_the_grace(served: Served) -> None:
    pids = [process.pid for process in engines(served)]
    served.terminate()
    assert served.exit_code(30) == 0
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {name: a, paht: /x}\n", ":3: models[0].paht: unknown key; did you mean path?"),
        ("- {name: a, path: MODEL, replicas: 3}\n", "model a"),
        ("- {name: a, path: /nowhere}\n", "/nowhere"),
    ],
)
def test_what_cannot_be_served_ends_with_one_message(
    embedded_model: Path, tmp_path: Path, text: str, says: str
) -> None:
    with Served(write(tmp_path, embedded_model, text), wait=False) as server:
        assert server.exit_code(30) == 1
        assert says in server.stderr()
        assert "Traceback" not in server.stderr()


def test_a_file_that_vanishes_or_shrinks_is_told_and_costs_the_others_nothing(
    embedded_model: Path, tmp_path: Path
) -> None:
    options = "max_model_len: 512, max_concurrency: 2, options: {threads: 1}"
    file = tmp_path / "model.gguf"
    shutil.copyfile(embedded_model, file)
    text = f"- {{name: one, path: {file}, {options}}}\n- {{name: two, path: MODEL, {options}}}\n"
    with Served(write(tmp_path, embedded_model, text)) as server:
        base = f"{server.url}/v2/repository/models/one"
        os.truncate(file, 1000)  # its pages are gone, too
        lost = httpx.post(f"{server.url}/v1/completions", json={"model": "one", "prompt": "a b c", "max_tokens": 32})
        assert lost.status_code == 503
        server.wait_status("/v2/models/one/ready", 503)
        load = httpx.post(f"{base}/load")
        assert (load.status_code, "is being started again" in load.json()["error"]) == (503, True)
        file.unlink()
        assert httpx.post(f"{base}/unload").status_code == 200
        load = httpx.post(f"{base}/load", timeout=60)
        assert (load.status_code, f"{file} does not exist" in load.json()["error"]) == (400, True)
        assert complete(server, "two").status_code == 200
        shutil.copyfile(embedded_model, file)
        assert httpx.post(f"{base}/load", timeout=60).status_code == 200
        assert complete(server, "one").status_code == complete(server, "two").status_code == 200
        server.terminate()
        assert server.exit_code() == 0
        assert "Traceback" not in server.stderr()
