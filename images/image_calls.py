"""What each image is asked once it runs, and how it ends: servers by a request and SIGTERM, the trainer by a job."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import yaml

from guardrail_values import github_pat
from image_build import ROOT
from image_store import Container, Process, check
from kube_double.cluster import Cluster, cluster
from operator_process import certificates
from ports import free_ports

MODEL = ROOT / ".models/smollm2"
READY_S = 300
#: terminationGracePeriodSeconds of what the manifests hold.
GRACE_S, TRAINER_GRACE_S = 60, 600
_MOUNTED_MODEL = {MODEL: "/mnt/models"}
# Made up, valid to the checksum: the examples of documentation are known, and let pass.
_SECRET = f"My token is {github_pat(Random(7))}, what does it open?"
_POLICIES = "/apis/aim.amd.com/v1alpha1/namespaces/default/guardrailpolicies"
_POLICY = {
    "apiVersion": "aim.amd.com/v1alpha1",
    "kind": "GuardrailPolicy",
    "metadata": {"name": "mine"},
    "spec": {"prompt": [{"type": "pii", "action": "block"}]},
}
# vLLM comes with a base that is not to be had here.
_IMPORT_ALL = """
import importlib, pkgutil, sys
for root in map(importlib.import_module, sys.argv[1:]):
    for module in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if "__main__" not in module.name and ".engines.vllm." not in module.name:
            importlib.import_module(module.name)
"""


def import_all(container: Container, packages: Sequence[str]) -> None:
    """Nothing that they import once they run is missing, be it late."""
    container.says("python", "-c", _IMPORT_ALL, *packages)


@contextmanager
def served(
    container: Container, log: Path, port: int, path: str, *arguments: str, **options: Mapping[Any, str]
) -> Iterator[tuple[Process, float]]:
    """Its entry point, running, and the seconds until `path` answered 200."""
    begun = time.monotonic()
    with log.open("w") as file, container.process(*container.entry(*arguments), output=file, **options) as process:
        while ask(port, "GET", path)[0] != 200:
            check(process.crun.poll() is None, f"{container.name}: ended with exit {process.crun.returncode}: {log}")
            check(time.monotonic() - begun < READY_S, f"{container.name}: not ready after {READY_S} s: {log}")
            time.sleep(0.1)
        yield process, time.monotonic() - begun


def ask(port: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Status and body of an answer; 0 where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        sent = json.dumps(body) if body else None
        connection.request(method, path, sent, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def chat(port: int, says: str) -> tuple[int, str]:
    """An answer of eight tokens."""
    messages = [{"role": "user", "content": says}]
    return ask(port, "POST", "/v1/chat/completions", {"model": "smollm2", "messages": messages, "max_tokens": 8})


def call_runtime(container: Container, folder: Path) -> str:
    """A chat, on llama.cpp."""
    with _runtime(container, folder) as (port, process, ready):
        _answers(port)
        ended = process.stop(GRACE_S)
    return f"ready in {ready:.1f} s, a chat answered; SIGTERM: {ended:.1f} s"


def call_guardrail(container: Container, folder: Path, runtime: Container) -> str:
    """A chat through it to a runtime; and no secret passes."""
    with _runtime(runtime, folder) as (behind, _, _):
        http_port, grpc_port = free_ports(2)
        arguments = [*_listening(http_port, grpc_port), "--predictor_host", f"127.0.0.1:{behind}"]
        log = folder / "guardrail.log"
        with served(container, log, http_port, "/v2/models/smollm2/ready", *arguments) as (process, ready):
            _answers(http_port)
            status, text = chat(http_port, _SECRET)
            check(status == 400 and "content_filter" in text, f"guardrail: a secret was answered by {status} {text}")
            ended = process.stop(GRACE_S)
    return f"ready in {ready:.1f} s, a chat answered, a secret refused; SIGTERM: {ended:.1f} s"


@contextmanager
def _runtime(container: Container, folder: Path) -> Iterator[tuple[int, Process, float]]:
    http_port, grpc_port = free_ports(2)
    arguments = ["--model_dir", "/mnt/models", *_listening(http_port, grpc_port)]
    path, log = "/v2/models/smollm2/ready", folder / "runtime.log"
    with served(container, log, http_port, path, *arguments, mounts=_MOUNTED_MODEL) as (process, ready):
        yield http_port, process, ready


def _listening(http_port: int, grpc_port: int) -> list[str]:
    name = ["--model_name", "smollm2", "--host", "127.0.0.1"]
    return [*name, "--http_port", str(http_port), "--grpc_port", str(grpc_port)]


def _answers(port: int) -> None:
    status, text = chat(port, "What is a GPU?")
    check(status == 200 and "completion_tokens" in text, f"chat: {status} {text}")


def call_trainer(container: Container) -> str:
    """It reads the sample's every row, and its torch is the base's."""
    mounts = {ROOT / "docs/samples": "/workspace/docs/samples", MODEL: "/workspace/.models/smollm2"}
    told = container.says(*container.entry("validate", "docs/samples/finetuning/job.yaml"), mounts=mounts)
    torch = container.says("python", "-c", "import torch; print(torch.__version__, torch.__file__)")
    check("/opt/aim" not in torch, f"aim-trainer: the base's torch was replaced: {torch}")
    return f"{' '.join(told.split())[:60]}; torch {torch.split()[0]} is the base's"


def call_operator(container: Container, folder: Path) -> str:
    """It keeps a policy as a ConfigMap, of a Kubernetes API that is a double."""
    http_port, webhook_port, report_port = free_ports(3)
    given = {certificates(folder / "certificates", "127.0.0.1"): "/etc/aim/certificates"}
    arguments = ["--certificates", "/etc/aim/certificates", "--webhook-host", "127.0.0.1", "--host", "127.0.0.1"]
    arguments += ["--http-port", str(http_port), "--webhook-port", str(webhook_port), "--report-port", str(report_port)]
    with cluster(folder) as kubernetes:
        _prepare(kubernetes)
        # Whoever runs in the container reads it, under any number.
        kubernetes.kubeconfig.chmod(0o644)
        given[kubernetes.kubeconfig] = "/etc/aim/kubeconfig"
        environment = {"KUBECONFIG": "/etc/aim/kubeconfig"}
        options: dict[str, Mapping[Any, str]] = {"mounts": given, "environment": environment}
        with served(container, folder / "operator.log", http_port, "/readyz", *arguments, **options) as (
            process,
            ready,
        ):
            kubernetes.create(_POLICIES, _POLICY)
            kubernetes.wait_for(_POLICIES, "mine", _is_valid)
            ended = process.stop(GRACE_S)
    return f"ready in {ready:.1f} s, a policy kept; SIGTERM: {ended:.1f} s"


def _prepare(kubernetes: Cluster) -> None:
    for file in sorted((ROOT / "manifests/crds").glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            if document and document["kind"] == "CustomResourceDefinition":
                kubernetes.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", document)
    kubernetes.create("/api/v1/namespaces", {"metadata": {"name": "aim-system"}})


def _is_valid(policy: Mapping[str, Any]) -> bool:
    conditions = policy.get("status", {}).get("conditions", [])
    return any(each["type"] == "Valid" and each["status"] == "True" for each in conditions)
