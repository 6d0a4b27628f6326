"""The whole path on one machine, `make e2e`: tuned, published, planned, served, guarded, asked, counted, paid.

Every part is the product's own, as a process: the trainer, the planner over an emulated node, vLLM's CPU build under
the runtime with the published adapter, the guardrail before it, the exporter, and a real Prometheus that scrapes them
by the rules that are shipped. Nothing here computes what is checked but the price that the cost is held against.
Ends with a table; exits 1 where a step did not hold. All it makes is in .run/e2e.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import yaml

import vllm_lane
from aim_runtime.stack import NotStarted, Stack, running
from ports import free_ports
from real_prometheus import Prometheus, target

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".run/e2e"
SAMPLE = ROOT / "docs/samples/finetuning/job.yaml"
TRAINER = ROOT / ".venv-trainer/bin/python"
NAME = "kettlo-helper"
BASE = f"{NAME}-base"
#: Of the sample's 75: about two minutes of one core, with what is judged before and after.
STEPS = 20
#: vLLM and torch take 2.5 GiB before the model.
NODE = {"version": 1, "kind": "cpu", "name": "laptop", "cores": 2, "memory": "6600MiB", "partitions": 2}
CARD_HOUR = 0.5
PRICES = {
    "version": 1,
    "currency": "EUR",
    "gpu_hour": {"cpu": CARD_HOUR},
    "million_tokens": {BASE: {"prompt": 100.0, "generation": 400.0}},
}
QUESTION = "How do I reset my Kettlo?"
#: Of AWS's form, put together here so that no scanner takes this file for a leak.
SECRET = "AKIA" + "3XPZ7QKLMN2VWTYB"
START_S = 600


class Failed(Exception):
    """A step did not hold. The message says what was seen."""


class Steps:
    """What was done, how long it took, and whether it held."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float, str]] = []

    @contextmanager
    def step(self, what: str) -> Iterator[Callable[[str], None]]:
        print(f"\n==> {what}", flush=True)
        started, told = time.monotonic(), [""]

        def say(text: str) -> None:
            told[0] = text
            print(f"    {text}", flush=True)

        try:
            yield say
        except (Failed, NotStarted, AssertionError, openai.OpenAIError) as problem:
            self.rows.append((what, "FAILED", time.monotonic() - started, str(problem)))
            raise Failed(str(problem)) from problem
        self.rows.append((what, "held", time.monotonic() - started, told[0]))

    def print_table(self) -> None:
        print(f"\n{'step':44} {'':6} {'seconds':>8}  seen")
        for what, state, seconds, seen in self.rows:
            print(f"{what:44} {state:6} {seconds:8.1f}  {' '.join(seen.split())[:150]}")
        print(f"{'together':44} {'':6} {sum(row[2] for row in self.rows):8.1f}")


def main() -> int:
    missing = [part for part in (TRAINER, vllm_lane.PYTHON, vllm_lane.MODEL_DIR) if not part.exists()]
    if missing or shutil.which("prometheus") is None:
        print(f"missing: {', '.join(map(str, missing)) or 'prometheus'}; make trainer vllm system-deps")
        return 1
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    steps = Steps()
    try:
        with ExitStack() as stack:
            whole_path(steps, stack)
    except Failed as problem:
        print(f"    it did not hold: {problem}")
    steps.print_table()
    return 0 if all(state == "held" for _, state, *_ in steps.rows) else 1


def whole_path(steps: Steps, ended: ExitStack) -> None:
    training, exporter, *ports = free_ports(6)
    pod = {"namespace": "llm", "node": "laptop"}
    targets = [
        target("aim-trainer", f"127.0.0.1:{training}", {**pod, "pod": "trainer-0"}),
        target("aim-exporter", f"127.0.0.1:{exporter}", {"namespace": "monitoring"}, honor_labels=True),
        target("aim-serving", f"127.0.0.1:{ports[2]}", {**pod, "pod": "runtime-0"}),
        target("aim-guardrail", f"127.0.0.1:{ports[0]}", {**pod, "pod": "guardrail-0"}),
    ]
    prometheus = Prometheus(WORK, targets)
    ended.callback(prometheus.close)
    with steps.step("fine-tune the embedded model") as say:
        say(tuned(training))
    with steps.step("the published version and its profile") as say:
        version = WORK / "registry" / (WORK / "registry/latest").read_text().strip()
        context, rank, told = published(version)
        say(told)
    with steps.step("plan it on an emulated node") as say:
        say(planned(context, rank))
    stack = Stack(NAME, str(version), "127.0.0.1", *ports, policy=str(policy()), ready_timeout_s=START_S)
    with steps.step("runtime with the adapter, guardrail before it") as say:
        ended.enter_context(running(served(stack, version), show_logs=False))
        say(f"{NAME} answers at {stack.url}/v1; unguarded on port {stack.runtime_http_port}")
    ended.enter_context(exporting(exporter))
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        asked(steps, client)
    with steps.step("Prometheus sees all of them") as say:
        say(seen(prometheus))
    with steps.step("what it cost") as say:
        say(paid(prometheus))


def tuned(port: int) -> str:
    """The sample's job over the model as safetensors: what comes out is an adapter, which vLLM takes."""
    job = yaml.safe_load(SAMPLE.read_text())
    spec = job["spec"]
    spec["baseModel"] = {"modelId": str(vllm_lane.MODEL_DIR)}
    spec["hyperparameters"] |= {"maxSteps": STEPS}
    del spec["hyperparameters"]["epochs"]
    spec["checkpoints"] = {"everySteps": STEPS}
    spec["validation"] = {"metrics": ["eval_loss"], "gates": [{"metric": "eval_loss", "maxDelta": -1}]}
    spec["output"] = {"registry": str(WORK / "registry")}
    (WORK / "job.yaml").write_text(yaml.safe_dump(job))
    told = ["run", str(WORK / "job.yaml"), "--no-ray", "--directory", str(WORK / "run")]
    command([str(TRAINER), "-m", "aim_trainer", *told], AIM_TRAINER_METRICS_PORT=str(port))
    found = json.loads((WORK / "run/evaluation.json").read_text())
    base, own = (found[which]["eval_loss"] for which in ("base", "tuned"))
    return f"{STEPS} steps of LoRA, held-out loss {base:.2f} -> {own:.2f}"


def published(version: Path) -> tuple[int, int, str]:
    """Its context, its adapter's rank, and a line about it. Raises Failed."""
    profile = yaml.safe_load((version / "serving-profile.yaml").read_text())
    arguments, tuning = profile["engine_args"], profile["finetuning"]
    if not (version / "adapter_model.safetensors").is_file():
        raise Failed(f"{version} has no adapter")
    told = f"{version.name}: an adapter of rank {tuning['lora_rank']}, max-model-len {arguments['max-model-len']}"
    return arguments["max-model-len"], arguments["max-lora-rank"], told


def planned(context: int, rank: int) -> str:
    load = {"name": BASE, "model": str(vllm_lane.MODEL_DIR), "context": context, "concurrency": 2}
    workloads = [{**load, "lora_slots": 1, "lora_rank": rank}]
    files: dict[str, dict[str, Any]] = {
        "node": NODE,
        "fleet": {"version": 1, "nodes": [{"file": "node.yaml"}]},
        "workloads": {"version": 1, "workloads": workloads},
        "prices": PRICES,
    }
    for name, body in files.items():
        (WORK / f"{name}.yaml").write_text(yaml.safe_dump(body))
    out = ["--out", str(WORK / "plan.yaml")]
    told = command(profile_command("plan", str(WORK / "fleet.yaml"), str(WORK / "workloads.yaml"), *out))
    (placed,) = yaml.safe_load((WORK / "plan.yaml").read_text())["placements"]
    return f"partition {placed['partitions']} of {placed['node']}: {told.splitlines()[0]}"


def served(stack: Stack, version: Path) -> Stack:
    """The version's own models.yaml, with vLLM's interpreter and what its CPU build needs."""
    models = yaml.safe_load((version / "models.yaml").read_text())
    (entry,) = models["models"]
    entry |= {"python": str(vllm_lane.PYTHON), "max_concurrency": 2}
    options = entry["options"]
    options["engine_args"] |= {"enforce-eager": True, "dtype": "float32"}
    options["adapters"] = {name: str(version / place) for name, place in options["adapters"].items()}
    (WORK / "models.yaml").write_text(yaml.safe_dump(models))
    files = {"--models": "models.yaml", "--placement": "plan.yaml", "--node": "node.yaml"}
    flags = tuple(word for flag, name in files.items() for word in (flag, str(WORK / name)))
    return replace(stack, runtime_flags=flags)


def policy() -> Path:
    file = WORK / "policy.yaml"
    rules = {"prompt": [{"type": "secrets", "action": "block"}, {"type": "pii", "action": "redact"}]}
    file.write_text(yaml.safe_dump({"version": 2, "name": "e2e", "use_case": "chat", "budget_ms": 1000, **rules}))
    return file


@contextmanager
def exporting(port: int) -> Iterator[None]:
    told = [f"--{name}={WORK / name}.yaml" for name in ("node", "plan", "prices")]
    with (WORK / "exporter.log").open("wb") as log:
        command = profile_command("exporter", *told, "--host=127.0.0.1", f"--port={port}")
        with subprocess.Popen(command, stdout=log, stderr=log) as started:
            try:
                yield
            finally:
                started.terminate()


def asked(steps: Steps, client: openai.OpenAI) -> None:
    with steps.step("a chat by OpenAI's client") as say:
        own, base = (chat(client, name, QUESTION) for name in (NAME, BASE))
        if own == base:
            raise Failed(f"with and without the adapter the answer is {own!r}")
        say(f"{own!r} (without the adapter: {base[:60]!r})")
    with steps.step("a prompt that leaks a key") as say:
        try:
            raise Failed(f"it was answered: {chat(client, NAME, f'Deploy with aws_access_key_id = {SECRET}')!r}")
        except openai.BadRequestError as refused:
            body = refused.body
            if not isinstance(body, dict) or body.get("type") != "content_filter" or SECRET in str(body):
                raise Failed(f"refused as {body}") from refused
            say(f"refused, 400 {body['type']}: {body['message']}")


def chat(client: openai.OpenAI, model: str, text: str) -> str:
    messages: list[Any] = [{"role": "system", "content": "You are the Kettlo helper."}]
    messages.append({"role": "user", "content": text})
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=32, temperature=0)
    return answer.choices[0].message.content or ""


def seen(prometheus: Prometheus) -> str:
    """A number of each part, as scraped."""
    wanted = {
        "training steps": f"max_over_time(aim_trainer_step[1h]) == {STEPS}",
        "tokens generated": f'sum(aim_generation_tokens_total{{model_name="{BASE}"}}) > 0',
        "blocked": 'sum(guardrail_requests_total{decision="block"}) == 1',
        "partitions": "count(aim_partition_compute_units) == 2",
        "devices held": f'count(aim_model_device_info{{model_name="{BASE}"}}) == 1',
    }
    found: dict[str, str] = {}

    def all_there() -> bool:
        for name, expr in wanted.items():
            if series := prometheus.query(expr):
                found[name] = series[0]["value"][1]
        return len(found) == len(wanted)

    prometheus.wait(all_there, lambda: f"without data: {sorted(set(wanted) - set(found))}")
    return ", ".join(f"{name} {value}" for name, value in found.items())


def paid(prometheus: Prometheus) -> str:
    """One of two partitions: half of what the table asks for the machine; and its tokens' price."""
    of_model = f'{{model_name="{BASE}", currency="EUR"}}'
    hour, tokens = (
        f"namespace_model:aim_gpu_cost_per_hour:sum{of_model}",
        f"namespace_model:aim_token_price_per_hour:sum{of_model}",
    )
    prometheus.wait(
        lambda: bool(prometheus.query(f"{hour} == {CARD_HOUR / 2}") and prometheus.query(f"{tokens} > 0")),
        lambda: f"{prometheus.query(hour)}, {prometheus.query(tokens)}",
    )
    of_tokens = float(prometheus.query(tokens)[0]["value"][1])
    return (
        f"{CARD_HOUR / 2} EUR an hour for half of a machine of {CARD_HOUR}; its tokens earn {of_tokens:.3f} EUR an hour"
    )


def profile_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "aim_profile", *arguments]


def command(argv: Sequence[str], **variables: str) -> str:
    """What it printed; shown as it comes. Raises Failed where it ends with anything but 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    lines = []
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(f"    | {line}", end="", flush=True)
    if process.returncode:
        raise Failed(f"{argv[2]} {argv[3]} ended with {process.returncode}: {lines[-1].strip() if lines else ''}")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
