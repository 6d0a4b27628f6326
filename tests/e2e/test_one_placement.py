"""From the planner's own file: four models on four partitions of one node, three on llama.cpp and one on vLLM.

Each engine is a process of its own on its own CPU set; vLLM's lives in another environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import orjson
import psutil
import pytest
import tritonclient.http as triton
import yaml
from prometheus_client.parser import text_string_to_metric_families

import vllm_lane
from served import Served

pytestmark = [pytest.mark.model, pytest.mark.vllm]

GRPC_CLIENT = Path(__file__).parents[1] / "fakes/triton_grpc_client.py"
SMALL, LARGE = ("one", "two", "three"), "large"
NAMES = (*SMALL, LARGE)
MEMORY_MIB = 3300  # a partition: vLLM and torch take 2.5 GiB before the model
REQUESTS = 500
START_S = 600  # vLLM imports torch in three processes, one after another


@pytest.fixture(scope="module")
def plan(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of node, workloads, models and the plan that ``aim-profile plan`` made of them."""
    vllm_lane.require_vllm_lane()
    folder = tmp_path_factory.mktemp("placement")
    cpus = sorted(os.sched_getaffinity(0))
    partitions = [{"cpus": [cpus[at % len(cpus)]], "memory": f"{MEMORY_MIB}MiB"} for at in range(len(NAMES))]
    workloads, models = [], []
    for name in SMALL:
        (folder / name).mkdir()
        shutil.copyfile(embedded_model, folder / name / embedded_model.name)
        workloads.append({"name": name, "model": str(folder / name), "context": 512, "concurrency": 2})
        models.append({"name": name, "path": str(folder / name), "options": {"threads": 1}})
    workloads.append({"name": LARGE, "model": str(vllm_lane.MODEL_DIR), "context": 512, "concurrency": 2})
    flags = {"dtype": "float32", "enforce-eager": True}
    large = {"name": LARGE, "path": str(vllm_lane.MODEL_DIR), "engine": "vllm", "options": {"engine_args": flags}}
    models.append({**large, "python": str(vllm_lane.PYTHON)})
    files = {
        "node.yaml": {"version": 1, "kind": "cpu", "share_cpus": True, "partitions": partitions},
        "fleet.yaml": {"version": 1, "nodes": [{"name": "laptop", "file": "node.yaml"}]},
        "workloads.yaml": {"version": 1, "workloads": workloads},
        "models.yaml": {"version": 1, "models": models},
    }
    for name, content in files.items():
        (folder / name).write_bytes(orjson.dumps(content))  # JSON is YAML
    told = ["plan", "fleet.yaml", "workloads.yaml", "--out", "plan.yaml"]
    planned = subprocess.run([sys.executable, "-m", "aim_profile", *told], cwd=folder, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    return folder


@pytest.fixture(scope="module")
def server(plan: Path) -> Iterator[Served]:
    files = {"--models": "models.yaml", "--placement": "plan.yaml", "--node": "node.yaml"}
    told = [word for flag, name in files.items() for word in (flag, str(plan / name))]
    with Served(["-m", "aim_runtime", *told, "--node_name", "laptop"], wait=False) as server:
        server.wait_ready(START_S)
        yield server


def engine(server: Served, name: str) -> psutil.Process:
    """The process of a small model's engine: the one that has mapped its file."""
    children = psutil.Process(server.process.pid).children()
    (found,) = (child for child in children if f"/{name}/" in Path(f"/proc/{child.pid}/maps").read_text())
    return found


def complete(server: Served, name: str, tokens: int = 2) -> httpx.Response:
    body = {"model": name, "prompt": "The sea is", "max_tokens": tokens, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def meanwhile(server: Served, names: tuple[str, ...], requests: int, act: Callable[[], None]) -> Counter[str]:
    """Ask the models in turn, four at once, and ``act`` after a tenth of it; what came back."""
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, server, names[at % len(names)]) for at in range(requests)]
        while sum(one.done() for one in asked) < requests // 10:
            time.sleep(0.01)
        act()
        answers = [one.result() for one in asked]
    return Counter("answered" if answer.status_code == 200 else answer.text for answer in answers)


@pytest.mark.parametrize("name", NAMES)
def test_each_answers_by_its_name_on_every_protocol(server: Served, name: str) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model=name, prompt="The sea is", max_tokens=4, temperature=0)
    assert answer.model == name
    text = answer.choices[0].text
    assert text.strip()
    chunks = client.completions.create(model=name, prompt="The sea is", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    parameters = {"max_tokens": 4, "temperature": 0}
    v1 = {"instances": ["The sea is"], "parameters": parameters}
    assert httpx.post(f"{server.url}/v1/models/{name}:predict", json=v1, timeout=60).json() == {"predictions": [text]}
    rest = triton.InferenceServerClient(server.url.removeprefix("http://"))
    tensor = triton.InferInput("prompt", [1], "BYTES")
    tensor.set_data_from_numpy(_bytes("The sea is"))
    assert rest.is_model_ready(name)
    assert rest.infer(name, [tensor], parameters=parameters).as_numpy("text")[0].decode() == text
    call = {"infer": {"model": name, "prompts": ["The sea is"], "parameters": {"max_tokens": 4, "temperature": "0"}}}
    over_grpc = subprocess.run(
        [sys.executable, str(GRPC_CLIENT), server.grpc_url], input=orjson.dumps(call), capture_output=True, check=True
    )
    assert orjson.loads(over_grpc.stdout)["text"] == [text]


def _bytes(text: str) -> object:
    import numpy as np

    return np.array([text.encode()], dtype=object)


def test_each_engine_is_where_the_plan_says(server: Served, plan: Path) -> None:
    placements = yaml.safe_load((plan / "plan.yaml").read_text())["placements"]
    planned = {placement["workload"]: placement["partitions"][0] for placement in placements}
    assert sorted(planned.values()) == list(range(len(NAMES)))
    cpus = sorted(os.sched_getaffinity(0))
    for name in SMALL:
        process = engine(server, name)
        assert process.cpu_affinity() == [cpus[planned[name] % len(cpus)]]
        assert process.rlimit(psutil.RLIMIT_DATA)[0] == MEMORY_MIB * 2**20
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    samples = [
        sample.labels for family in families if family.name == "aim_model_device_info" for sample in family.samples
    ]
    assert {labels["model_name"]: int(labels["partition"]) for labels in samples} == planned


def test_a_killed_engine_costs_the_others_nothing(server: Served) -> None:
    expected = complete(server, "two").json()["choices"][0]["text"]

    def kill() -> None:
        engine(server, "two").send_signal(signal.SIGKILL)
        refused = server.wait_status("/v2/models/two/ready", 503)
        assert refused.status_code == 503
        answer = complete(server, "two")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1

    seen = meanwhile(server, ("one", "three", LARGE), REQUESTS, kill)
    assert seen == {"answered": REQUESTS}
    server.wait_status("/v2/models/two/ready", 200)
    assert complete(server, "two").json()["choices"][0]["text"] == expected


def test_a_model_moves_under_load_and_loses_no_request(server: Served, plan: Path) -> None:
    """``three`` makes room, ``one`` moves there and back."""
    where = {p["workload"]: p["partitions"][0] for p in yaml.safe_load((plan / "plan.yaml").read_text())["placements"]}

    def post(name: str, verb: str, **body: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v2/repository/models/{name}/{verb}", json=body, timeout=60)

    taken = post("one", "migrate", card=0, partition=where["three"])
    assert taken.status_code == 409
    assert "3.2 GiB short, model three has card 0 partition" in taken.json()["error"]
    assert post("one", "migrate", card=0, partition=9).status_code == 400
    assert post("one", "migrate", card=0, partitoin=1).status_code == 400
    assert post("three", "unload").status_code == 200
    before = engine(server, "one")

    def there_and_back() -> None:
        for name in ("three", "one"):
            answer = post("one", "migrate", card=0, partition=where[name])
            assert answer.status_code == 200, answer.text
            assert answer.json()["place"] == f"card 0 partition {where[name]}"

    requests = REQUESTS // 2
    assert meanwhile(server, ("one", "one", LARGE), requests, there_and_back) == {"answered": requests}
    assert engine(server, "one") != before
    assert post("three", "load").status_code == 200


def test_loading_and_unloading_costs_the_others_nothing(server: Served) -> None:
    def come_and_go() -> None:
        for verb in ("unload", "load"):
            answer = httpx.post(f"{server.url}/v2/repository/models/one/{verb}", timeout=60)
            assert answer.status_code == 200, answer.text

    requests = REQUESTS // 5
    assert meanwhile(server, ("two", "three", LARGE), requests, come_and_go) == {"answered": requests}
    assert complete(server, "one").status_code == 200


def test_sigterm_ends_all_of_them(server: Served) -> None:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert len(processes) > len(NAMES)  # vLLM has some of its own
    server.terminate()
    assert server.exit_code(60) == 0
    assert psutil.wait_procs(processes, 30)[1] == []
