"""Policies side by side: a directory of them, each for its tenant's callers, one for everybody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from aim_guardrail.cli.policy import main
from aim_guardrail.policy import PolicyError, load_policies
from aim_kserve.identity import keys as key_file
from aim_kserve.kserve import pb, pb_grpc
from closed_pair import bearer
from fake_predictor import FakePredictor
from guarded import ask, eventually, guardrail, metric
from served import Served

CARD, MAIL = "4111 1111 1111 1111", "jane.doe@example.com"
POLICY = """\
version: 2
name: {name}
{more}
prompt:
- {{type: pii, action: {action}, entities: [EMAIL_ADDRESS]}}
"""


def write(directory: Path, name: str, action: str = "redact", **more: object) -> Path:
    """A policy of e-mail addresses."""
    directory.mkdir(exist_ok=True)
    file = directory / f"{name}.yaml"
    lines = "\n".join(f"{key}: {value}" for key, value in more.items())
    file.write_text(POLICY.format(name=name, action=action, more=lines))
    return file


def test_each_file_is_its_tenants(tmp_path: Path) -> None:
    write(tmp_path, "common")
    write(tmp_path, "of-a", tenant="a")
    write(tmp_path, "next", shadow="true")
    (tmp_path / ".hidden.yaml").write_text("no policy")
    (tmp_path / "README.md").write_text("no policy")
    read = load_policies(tmp_path)
    assert (read.of(None).name, read.of("a").name, read.of("b").name) == ("common", "of-a", "common")
    assert {tenant: policy.name for tenant, policy in read.shadows.items()} == {None: "next"}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"one": {}, "two": {}}, r"one.yaml and .*two.yaml: each is everybody's policy: remove one"),
        ({"x": {}, "one": {"tenant": "a"}, "two": {"tenant": "a"}}, r"one.yaml and .*two.yaml: each is tenant 'a'"),
        ({"one": {"tenant": "a"}, "two": {"tenant": "b"}}, r"no policy is everybody's \(one.yaml, two.yaml\): leave"),
        ({"one": {}, "two": {"shadow": "true"}, "x": {"shadow": "true"}}, r"two.yaml and .*x.yaml: each is .* shadow"),
        ({"one": {"shadow": "true"}}, r"no policy is everybody's"),
        ({"one": {"tenat": "a"}}, r"one.yaml:3: tenat: unknown key: did you mean 'tenant'"),
        ({"one": {"shadow": "maybe"}}, r"one.yaml:3: shadow: 'maybe' is refused"),
        ({}, r"no policy in it: put a file there"),
    ],
)
def test_a_directory_that_leaves_open_whose_policy_is_whose_is_refused(
    tmp_path: Path, files: dict[str, dict[str, str]], complaint: str
) -> None:
    for name, more in files.items():
        write(tmp_path, name, **more)
    with pytest.raises(PolicyError, match=complaint):
        load_policies(tmp_path)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A key for each tenant, and the path of their file under ``file``."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {tenant: key_file.new_key(f"key-{tenant}", tenant=tenant, scopes=["infer"]) for tenant in ("a", "b")}
    key_file.write(file, key_file.KeyFile(keys=tuple(entry for _, entry in made.values())))
    return {"file": str(file), **{tenant: text for tenant, (text, _) in made.items()}}


@pytest.fixture(scope="module")
def server(
    predictor: FakePredictor, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("policies")
    write(directory, "common", "redact")
    write(directory, "of-a", "block", tenant="a")
    with guardrail(predictor.host, "--policy", str(directory), "--api_keys", keys["file"]) as server:
        yield server


@pytest.mark.parametrize(("tenant", "status", "policy"), [("a", 400, "of-a"), ("b", 200, "common")])
def test_a_caller_is_judged_by_its_tenants_policy(
    server: Served, keys: dict[str, str], tenant: str, status: int, policy: str
) -> None:
    body = ask(f"write to {MAIL}")
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=bearer(keys[tenant]))
    assert answer.status_code == status
    assert answer.headers["x-guardrail-policy"].startswith(f"{policy}/")
    logged = answer.headers["x-guardrail-policy"]
    assert eventually(lambda: logged in [line.get("policy") for line in server.access_lines()])


@pytest.mark.parametrize(("tenant", "code"), [("a", "INVALID_ARGUMENT"), ("b", None)])
def test_over_grpc_too(server: Served, keys: dict[str, str], tenant: str, code: str | None) -> None:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(MAIL.encode())
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub, metadata = pb_grpc.GRPCInferenceServiceStub(channel), list(bearer(keys[tenant]).items())
        try:
            stub.ModelInfer(request, metadata=metadata, timeout=20)
            told = None
        except grpc.RpcError as error:
            told = error.code().name
    assert told == code


def test_what_is_broken_is_said_at_the_start(predictor: FakePredictor, tmp_path: Path) -> None:
    write(tmp_path, "one")
    write(tmp_path, "two")
    with guardrail(predictor.host, "--policy", str(tmp_path), wait=False) as server:
        assert server.exit_code() == 1
        assert "one.yaml and" in server.stderr()
        assert len(server.stderr().splitlines()) == 1


def test_without_identity_everybody_has_everybodys(predictor: FakePredictor, tmp_path: Path) -> None:
    write(tmp_path, "common")
    write(tmp_path, "of-a", "block", tenant="a")
    with guardrail(predictor.host, "--policy", str(tmp_path)) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask(MAIL))
        assert answer.headers["x-guardrail-policy"].startswith("common/")
        for name in ("common", "of-a"):
            assert metric(server, "guardrail_policy_info", name=name, mode="live") == 1


def test_a_directory_is_validated_as_the_server_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "common")
    write(tmp_path, "of-a", tenant="a", shadow="true")
    assert main(["validate", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "common (" in told
    assert told.endswith("version 2, for tenant a, a shadow\n")
    write(tmp_path, "another")
    assert main(["validate", str(tmp_path)]) == 1
    assert "each is everybody's policy" in capsys.readouterr().err
