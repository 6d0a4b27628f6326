"""The runtime with vLLM inside, over HTTP: one server for the whole module, as it takes a minute to start."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import psutil
import pytest

from ports import free_ports
from vllm_lane import MODEL_DIR, PYTHON, require_vllm_lane

pytestmark = pytest.mark.vllm

START_TIMEOUT_S = 400
MAX_MODEL_LEN = 1024
SLOTS = 4
QUEUE = 8
Json = dict[str, Any]

#: Long enough that nothing of it ends by itself while a test looks.
LONG: Json = {"max_tokens": 900, "ignore_eos": True}
HI = [{"role": "user", "content": "Say hello."}]


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    while_loading: set[int] = field(default_factory=set)
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def post(self, operation: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{operation}", json=body)

    def ask(self, operation: str, **body: Any) -> Json:
        response = self.post(operation, **body)
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer

    def gauge(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def in_flight(self) -> float:
        return self.gauge("aim_requests_running") + self.gauge("aim_requests_waiting")

    def becomes_idle(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if self.in_flight() == 0:
                return True
            time.sleep(0.02)
        return False

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                status = self.http.get("/v1/models/smollm2").status_code
            except httpx.ConnectError:
                status = 0
            if status == 200:
                return
            self.while_loading.add(status)
            time.sleep(0.5)
        pytest.fail(f"not ready after {START_TIMEOUT_S} s:\n{self.log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_vllm_lane()
    (http_port,) = free_ports(1)
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    engine_args = {
        "enforce-eager": True,
        "kv-cache-memory-bytes": "512M",
        "scheduling-policy": "priority",
        "max-num-queued-reqs": QUEUE,
    }
    flags = {
        "model_name": "smollm2",
        "model_dir": str(MODEL_DIR),
        "engine": "vllm",
        "host": "127.0.0.1",
        "http_port": str(http_port),
        "enable_grpc": "false",
        "max_model_len": str(MAX_MODEL_LEN),
        "max_concurrency": str(SLOTS),
        "engine_args": json.dumps(engine_args),
    }
    command = [str(PYTHON), "-m", "aim_runtime", *(f"--{name}={value}" for name, value in flags.items())]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{http_port}", process, log)
    descendants: list[psutil.Process] = []
    try:
        server.wait_until_ready()
        descendants = psutil.Process(process.pid).children(recursive=True)
        yield server
    finally:
        server.http.close()
        process.kill()
        process.wait()
        for left in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_answers_503_while_it_loads(server: Server) -> None:
    assert 503 in server.while_loading
    assert server.while_loading <= {0, 503}


# --- answers --------------------------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=HI, max_tokens=12)  # type: ignore[arg-type]
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.prompt_tokens > 20  # the template was applied


def test_the_answer_s_id_is_the_request_s(server: Server) -> None:
    response = server.post("chat/completions", messages=HI, max_tokens=2)
    assert response.json()["id"] == f"chatcmpl-{response.headers['x-request-id']}"


def test_the_stream_s_text_and_usage_are_the_answer_s(server: Server) -> None:
    body = {"model": "smollm2", "messages": HI, "max_tokens": 12, "temperature": 0}
    whole = server.ask("chat/completions", **body)
    *events, last = stream(server, "chat/completions", **body, stream_options={"include_usage": True})
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == {k: v for k, v in whole["usage"].items() if v is not None}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len(chunks) >= 12  # a chunk per token, not all at once
    assert last == "data: [DONE]"


def stream(server: Server, operation: str, **body: Any) -> list[str]:
    """The events of a stream, each without its blank line."""
    with server.http.stream("POST", f"/v1/{operation}", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return "".join(response.iter_text()).removesuffix("\n\n").split("\n\n")


def test_completions_of_several_prompts(server: Server) -> None:
    answer = server.ask("completions", prompt=["The capital of France is", "1, 2, 3,"], max_tokens=3, temperature=0)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert "Paris" in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 6


def test_json_schema_is_enforced(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = server.ask(
        "chat/completions",
        messages=[{"role": "user", "content": "Give me a person."}],
        max_tokens=120,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        structured_outputs={"json": schema, "disable_any_whitespace": True},
    )
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)


def test_logprobs_and_choices(server: Server) -> None:
    answer = server.ask(
        "chat/completions", messages=HI, max_tokens=3, n=2, temperature=1, logprobs=True, top_logprobs=2
    )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        tokens = choice["logprobs"]["content"]
        assert 1 <= len(tokens) <= 3
        assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in tokens)


def test_tokenize_and_back(server: Server) -> None:
    tokens = server.ask("tokenize", prompt="Hello, world", add_special_tokens=False)
    assert tokens["count"] == len(tokens["tokens"]) > 1
    assert tokens["max_model_len"] == MAX_MODEL_LEN
    assert server.ask("detokenize", tokens=tokens["tokens"])["prompt"] == "Hello, world"
    chat = server.ask("tokenize", messages=HI)
    assert chat["count"] == server.ask("chat/completions", messages=HI, max_tokens=1)["usage"]["prompt_tokens"]


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="smollm2", input="Say hello.", max_output_tokens=8)
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens <= 8


def test_responses_stream(client: openai.OpenAI) -> None:
    with client.responses.create(model="smollm2", input="Say hello.", max_output_tokens=8, stream=True) as events:
        seen = list(events)
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert seen[0].type == "response.created"
    assert seen[-1].type == "response.completed"
    assert seen[-1].response.output_text == text != ""


def test_kserve_v1(server: Server) -> None:
    response = server.http.post(
        "/v1/models/smollm2:predict",
        json={"instances": ["The capital of France is"], "parameters": {"max_tokens": 3, "temperature": 0}},
    )
    assert response.status_code == 200, response.text
    assert "Paris" in response.json()["predictions"][0]


#: vLLM's fields whose effect V1's and V2's answers can carry. A new vLLM may bring more: look at each before it joins.
V1_PARAMETERS = [
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "length_penalty",
    "logit_bias",
    "max_completion_tokens",
    "max_tokens",
    "media_io_kwargs",
    "min_p",
    "min_tokens",
    "mm_processor_kwargs",
    "presence_penalty",
    "reasoning_effort",
    "repetition_detection",
    "repetition_penalty",
    "response_format",
    "seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "temperature",
    "thinking_token_budget",
    "top_k",
    "top_p",
    "truncate_prompt_tokens",
    "truncation_side",
    "use_beam_search",
    "user",
    "vllm_xargs",
    "watermarking",
]


def test_the_parameters_of_v1_are_vllm_s(server: Server) -> None:
    body = {"instances": ["x"], "parameters": {"zzz": 1}}
    refusal = server.http.post("/v1/models/smollm2:predict", json=body).json()["error"]
    assert refusal.partition("known: ")[2].split(", ") == V1_PARAMETERS


def test_v1_and_v2_take_vllm_s_own_fields(server: Server) -> None:
    wanted = {"regex": "(yes|no)"}
    body: Json = {"instances": ["Is it?"], "parameters": {"max_completion_tokens": 4, "structured_outputs": wanted}}
    response = server.http.post("/v1/models/smollm2:predict", json=body)
    assert response.json()["predictions"][0] in ("yes", "no")
    tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["Is it?"]}
    parameters = {"max_completion_tokens": 4, "structured_outputs": json.dumps(wanted), "priority": 3}
    response = server.http.post("/v2/models/smollm2/infer", json={"inputs": [tensor], "parameters": parameters})
    assert response.json()["outputs"][0]["data"][0] in ("yes", "no")


def test_max_completion_tokens_limits_completions_too(server: Server) -> None:
    for limits in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 9}):
        answer = server.ask("completions", prompt="x", ignore_eos=True, **limits)
        assert answer["usage"]["completion_tokens"] == 3


def test_a_prompts_own_log_probabilities(server: Server) -> None:
    answer = server.ask("completions", prompt="One two three", max_tokens=0, echo=True, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == "One two three" == "".join(logprobs["tokens"])
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])


def test_history_and_prefills(server: Server) -> None:
    silent = [HI[0], {"role": "assistant", "content": None}, HI[0]]
    assert server.ask("chat/completions", messages=silent, max_tokens=1)["choices"]
    body: Json = {
        "messages": [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "1, 2, 3,"}]
    }
    body |= {"continue_final_message": True, "temperature": 0, "max_tokens": 4}
    for said in ({"add_generation_prompt": False}, {}):
        assert "4" in server.ask("chat/completions", **body, **said)["choices"][0]["message"]["content"]
    assert server.post("chat/completions", **body, add_generation_prompt=True).status_code == 400


def test_vllms_own_questions(server: Server) -> None:
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/version").json()["version"][0].isdigit()
    assert server.http.get("/load").json() == {"server_load": 0}


def test_what_the_model_does_not_have_is_said(server: Server) -> None:
    response = server.post("embeddings", model="smollm2", input="x")
    assert response.status_code == 400
    assert "does not support embeddings" in response.json()["error"]["message"]


def test_usage_reaches_metrics(server: Server) -> None:
    before = server.gauge("aim_generation_tokens_total")
    stream(server, "chat/completions", messages=HI, max_tokens=5, ignore_eos=True)
    stream(server, "responses", input="x", max_output_tokens=5, ignore_eos=True)
    server.ask("completions", prompt="x", max_tokens=5, ignore_eos=True)
    assert server.gauge("aim_generation_tokens_total") - before == 15


def test_vllm_s_own_metrics_are_served(server: Server) -> None:
    text = server.http.get("/metrics").text
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds_bucket"):
        assert f"\n{name}{{" in text


# --- bad input ------------------------------------------------------------------------------------------------------

CHAT = "chat/completions"
TOO_LONG = [{"role": "user", "content": "word " * 3000}]
BAD = [
    (CHAT, {}, 400, "messages"),
    (CHAT, {"messages": "hello"}, 400, "messages"),
    (CHAT, {"messages": []}, 400, None),
    (CHAT, {"messages": [{"content": "no role"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": HI, "temperature": -1}, 400, "temperature"),
    (CHAT, {"messages": HI, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": HI, "top_p": 2}, 400, "top_p"),
    (CHAT, {"messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 100_000}, 400, "max_tokens"),
    (CHAT, {"messages": HI, "seed": 2**63}, 400, "seed"),
    (CHAT, {"messages": HI, "stop": 5}, 400, "stop"),
    (CHAT, {"messages": HI, "stream": "maybe"}, 400, "stream"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 50}, 400, "logprobs"),
    (CHAT, {"messages": HI, "chat_template": "{{x}}"}, 400, None),
    (CHAT, {"messages": HI, "structured_outputs": {"regex": "("}}, 400, None),
    (CHAT, {"messages": HI, "tool_choice": "auto"}, 400, "tool_choice"),
    (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None),
    (CHAT, {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, 400, "tool_choice"),
    (CHAT, {"messages": HI, "grammar": "root ::= 'a'"}, 400, "grammar"),
    (CHAT, {"messages": HI, "json_schema": {"type": "string"}, "bogus": 1}, 400, "json_schema"),
    (CHAT, {"messages": HI, "guided_json": {"type": "object"}}, 400, "guided_json"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object", "schema": {}}}, 400, "response_format.schema"),
    (
        CHAT,
        {"messages": HI, "stream": True, "stream_options": {"continuous_usage_stats": True}},
        400,
        "stream_options.continuous_usage_stats",
    ),
    (CHAT, {"messages": HI, "suffix": "x"}, 400, "suffix"),
    ("completions", {"prompt": "x", "top_logprobs": 2}, 400, "top_logprobs"),
    ("completions", {"prompt": "x", "max_completion_tokens": "many"}, 400, "max_completion_tokens"),
    ("completions", {"prompt": "x", "max_completion_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": TOO_LONG}, 400, "input_tokens"),
    (CHAT, {"messages": HI, "model": "nope"}, 404, "model"),
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": 5}, 400, "prompt"),
    ("completions", {"prompt": [1, 999_999]}, 400, None),
    ("completions", {"prompt": "x", "model": "nope"}, 404, "model"),
    ("responses", {}, 400, "input"),
    ("responses", {"input": "x", "temperature": -1}, 400, "temperature"),
    ("responses", {"input": "x", "previous_response_id": "resp_1"}, 404, "response_id"),
    ("tokenize", {}, 400, "prompt"),
    ("tokenize", {"prompt": 5}, 400, "prompt"),
    ("tokenize", {"messages": [{"role": 1}]}, 400, "messages.0.role"),
    ("detokenize", {"tokens": ["a"]}, 400, "tokens.0"),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("operation", "body", "status", "param"), BAD)
def test_bad_input(server: Server, operation: str, body: Json, status: int, param: str | None, streamed: bool) -> None:
    """A stream refuses with the same status: never inside a 200."""
    if streamed and "stream" not in body and operation in (CHAT, "completions", "responses"):
        body = {**body, "stream": True}
    response = server.post(operation, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"]
    assert "Traceback" not in response.text


def test_unknown_fields_and_roles_are_vllm_s_to_judge(server: Server) -> None:
    answer = server.post(CHAT, messages=[{"role": "wizard", "content": "hi"}], max_tokens=2, bogus=1)
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.headers["x-ignored-fields"] == "bogus"


def test_malformed_json(server: Server) -> None:
    response = server.http.post(f"/v1/{CHAT}", content=b'{"messages": [')
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


# --- under load -----------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_its_stream_aborts(server: Server) -> None:
    before = server.gauge("aim_generation_tokens_total")
    with server.http.stream("POST", f"/v1/{CHAT}", json={"messages": HI, "stream": True, **LONG}) as response:
        chunks = response.iter_raw()  # kept: httpx closes the connection with it
        seen = b""
        while seen.count(b"data:") < 2:  # the first says who speaks, before there is a token
            seen += next(chunks)
        assert server.in_flight() == 1
    assert server.becomes_idle(within_s=2)
    deadline = time.monotonic() + 5
    while (counted := server.gauge("aim_generation_tokens_total") - before) == 0 and time.monotonic() < deadline:
        time.sleep(0.02)  # it is counted a moment after it has left
    assert 1 <= counted < LONG["max_tokens"]


@pytest.mark.parametrize("body", [{"n": 1}, {"n": 2, "temperature": 1}], ids=["one", "two"])
def test_a_client_that_leaves_aborts(server: Server, body: Json) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/{CHAT}", json={"messages": HI, **LONG, **body}, timeout=1)
    assert server.becomes_idle(within_s=2)


def test_overflow_is_a_503_before_any_stream_starts(server: Server) -> None:
    """``--max-num-queued-reqs`` bounds running and waiting requests together."""
    body = {"messages": HI, "stream": True, **LONG}
    with ThreadPoolExecutor(QUEUE) as pool:
        full = threading.Event()
        streams = [pool.submit(leave_when, full, server, body) for _ in range(QUEUE)]
        wait_for(lambda: server.in_flight() == QUEUE)
        assert server.gauge("aim_requests_running") == SLOTS
        refused = server.post(CHAT, **body)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "service_unavailable"
        full.set()
        for task in streams:
            task.result()
    assert server.becomes_idle(within_s=5)


def leave_when(full: threading.Event, server: Server, body: Json) -> None:
    with httpx.stream("POST", f"{server.url}/v1/{CHAT}", json=body, timeout=120) as response:
        for _ in response.iter_raw():
            if full.is_set():
                return


def wait_for(condition: Any, within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the end (last: it stops the server) ----------------------------------------------------------------------------


def test_sigterm_lets_a_stream_finish_and_leaves_nothing(server: Server) -> None:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert len(processes) >= 2  # vLLM's engine and its worker
    body = {"messages": HI, "stream": True, "max_tokens": 40, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/{CHAT}", json=body, timeout=60) as response:
        chunks = response.iter_text()
        text = next(chunks)
        server.process.send_signal(signal.SIGTERM)
        text += "".join(chunks)
    assert text.endswith("data: [DONE]\n\n")
    assert text.count("data: ") >= 40
    assert server.process.wait(30) == 0
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    last_words = server.log.read_text().split("stopping: not ready", 1)[1]
    assert "Traceback" not in last_words
    assert "stopped\n" in last_words
