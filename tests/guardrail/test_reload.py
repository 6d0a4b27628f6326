"""Policies that change while requests go on: whole or not at all, and no request is judged by two."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import orjson
import psutil
import pytest
from prometheus_client import CollectorRegistry

from aim_guardrail.audit.chain import verified
from aim_guardrail.detectors.base import Asked, Finding, Label, Passage
from aim_guardrail.detectors.families import FAMILIES, Family
from aim_guardrail.in_force import Generation, Policies, Reload
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import DetectorFailed
from aim_guardrail.policy import PolicySet, parse_policy
from fake_predictor import FakePredictor
from guarded import ask, events, eventually, guardrail, metric, orders, said
from served import Served

MAIL, CARD = "jane.doe@example.com", "4111 1111 1111 1111"
#: Two policies that answer the same request differently, in both of its directions.
A = """\
version: 2
name: mails
prompt: [{type: pii, action: redact, entities: [EMAIL_ADDRESS]}]
answer: [{type: pii, action: redact, entities: [EMAIL_ADDRESS]}]
"""
B = A.replace("mails", "cards").replace("EMAIL_ADDRESS", "CREDIT_CARD")
SEEN = {"mails": (f"<EMAIL_ADDRESS_1> {CARD}"), "cards": f"{MAIL} <CREDIT_CARD_1>"}
#: `make soak` does a hundred.
RELOADS = int(os.environ.get("SOAK_RELOADS", "30"))


class ConfigMap:
    """A directory as kubelet mounts a ConfigMap: files are links over ``..data``, which is swapped by one rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions = itertools.count()

    def update(self, **files: str) -> None:
        """Its files are these from now on."""
        version = self.directory / f"..{next(self._versions)}"
        version.mkdir()
        for name, text in files.items():
            (version / f"{name}.yaml").write_text(text)
        fresh = self.directory / "..data_tmp"
        fresh.symlink_to(version.name)
        fresh.rename(self.directory / "..data")
        for name in files:
            link = self.directory / f"{name}.yaml"
            if not link.is_symlink():
                link.symlink_to(f"..data/{name}.yaml")
        for link in self.directory.glob("[!.]*.yaml"):
            if not link.exists():
                link.unlink()


@pytest.fixture(scope="module")
def serving(
    predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, ConfigMap, Path]]:
    """One process, what is mounted in it, and its audit."""
    config, audit = ConfigMap(tmp_path_factory.mktemp("policies")), tmp_path_factory.mktemp("audit") / "audit.jsonl"
    config.update(policy=A)
    flags = ["--policy", str(config.directory), "--policy_poll_seconds", "0.01", "--audit_file", str(audit)]
    with guardrail(predictor.host, *flags) as server:
        yield server, config, audit


@pytest.fixture
def server(serving: tuple[Served, ConfigMap, Path]) -> Served:
    """The process, policy `A` in force."""
    server, config, _ = serving
    config.update(policy=A)
    assert eventually(lambda: policy_of(server).startswith("mails/"))
    assert eventually(lambda: last_reloaded(server) in (None, "mails"))  # said once it has been counted
    return server


def last_reloaded(server: Served) -> str | None:
    return next(reversed(re.findall(r"policies reloaded: (\w+)/", server.stderr())), None)


@pytest.fixture
def mount(serving: tuple[Served, ConfigMap, Path]) -> ConfigMap:
    return serving[1]


def policy_of(server: Served) -> str:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask("hi"))
    assert answer.status_code == 200
    return answer.headers["x-guardrail-policy"]


def test_a_changed_policy_comes_into_force(server: Served, mount: ConfigMap) -> None:
    first = policy_of(server)
    assert first.startswith("mails/")
    assert metric(server, "guardrail_policy_info", name="mails", version=first.split("/")[1]) == 1
    before = metric(server, "guardrail_policy_reload_total", result="ok")
    mount.update(policy=B)
    assert eventually(lambda: policy_of(server).startswith("cards/"))
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ask(f"{MAIL} {CARD}"))
    assert answer.json()["choices"][0]["message"]["content"] == SEEN["cards"]
    assert metric(server, "guardrail_policy_info", name="mails") == 0
    assert metric(server, "guardrail_policy_info", name="cards") == 1
    assert metric(server, "guardrail_policy_reload_total", result="ok") == before + 1


def test_a_broken_one_does_not_and_says_where(server: Served, mount: ConfigMap) -> None:
    before, refused = policy_of(server), metric(server, "guardrail_policy_reload_total", result="invalid")
    mount.update(policy=B.replace("redact", "censor"))
    assert eventually(lambda: metric(server, "guardrail_policy_reload_total", result="invalid") == refused + 1)
    assert f"{mount.directory}/policy.yaml:3: prompt[0].action: 'censor' is not allowed" in server.stderr()
    assert policy_of(server) == before
    assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
    mount.update(policy=B)
    assert eventually(lambda: policy_of(server).startswith("cards/"))


def test_a_request_in_flight_ends_on_the_policy_it_began_with(
    server: Served, mount: ConfigMap, predictor: FakePredictor
) -> None:
    tokens = ["say ", "more ", MAIL, " ", CARD, " ", "end"]
    slow = orders(tokens=tokens, token_s=0.2)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=ask("x", stream=True), headers=slow) as got:
        assert got.headers["x-guardrail-policy"].startswith("mails/")
        mount.update(policy=B)
        assert eventually(lambda: policy_of(server).startswith("cards/"))
        got.read()
    assert said(events(got)) == f"say more {SEEN['mails']} end"


class Load:
    """Clients that ask and ask: unary, and streamed."""

    def __init__(self, url: str, clients: int) -> None:
        self.answers = dict[str, int]()
        self.wrong: list[str] = []
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number % 2 == 1,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, stream: bool) -> None:
        body = ask(f"{MAIL} {CARD}", stream=stream)
        with httpx.Client(base_url=self._url, timeout=20) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/v1/chat/completions", json=body)
                    name = answer.headers["x-guardrail-policy"].split("/")[0]
                    text = said(events(answer)) if stream else answer.json()["choices"][0]["message"]["content"]
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    self.wrong.append(repr(error))
                    continue
                if answer.status_code != 200 or text != SEEN[name]:
                    self.wrong.append(f"{answer.status_code} {name}: {text}")
                self.answers[name] = self.answers.get(name, 0) + 1


def test_reloads_under_load(server: Served, serving: tuple[Served, ConfigMap, Path]) -> None:
    _, mount, audit = serving
    process = psutil.Process(server.process.pid)
    reloads, sizes = metric(server, "guardrail_policy_reload_total"), []
    told = len(lines_when_still(audit))
    with Load(server.url, clients=2) as load:
        for number in range(1, RELOADS + 1):
            mount.update(policy=(A, B)[number % 2])
            reloaded = eventually(lambda done=number: metric(server, "guardrail_policy_reload_total") == reloads + done)
            assert reloaded, server.stderr()
            name = ("mails", "cards")[number % 2]
            seen = load.answers.get(name, 0)
            assert eventually(lambda name=name, seen=seen: load.answers.get(name, 0) > seen)
            if number in (RELOADS // 2, RELOADS):
                sizes.append(process.memory_info().rss)
    assert load.wrong == []
    assert sizes[1] - sizes[0] < 8 * 2**20
    assert metric(server, "guardrail_policy_reload_total") == reloads + RELOADS
    requests = sum(load.answers.values())
    assert eventually(lambda: audit.read_bytes().count(b"\n") == told + 2 * requests)
    lines = audit.read_bytes().splitlines(keepends=True)
    assert verified(lines, None)[0] == told + 2 * requests
    by_request: dict[str, set[str]] = {}
    for line in map(orjson.loads, lines[told:]):
        by_request.setdefault(line["request_id"], set()).add(line["policy"])
    assert len(by_request) == requests
    assert {len(policies) for policies in by_request.values()} == {1}


def lines_when_still(audit: Path) -> list[bytes]:
    """The audit once every prompt of it has its answer."""
    assert eventually(lambda: audit.read_bytes().count(b'"direction":"answer"') * 2 == audit.read_bytes().count(b"\n"))
    return audit.read_bytes().splitlines()


# --- what a generation holds ----------------------------------------------------------------------------------------


class Judge:
    """A model that finds nothing, and can be told to fail."""

    family, digest = "judge", "1"
    cost: str = "model"
    made: list[Judge] = []  # noqa: RUF012  of the whole test
    broken = False

    def __init__(self) -> None:
        self.closed = 0
        Judge.made.append(self)

    async def scan_batch(self, passages: Sequence[Passage], asked: Asked) -> list[list[Finding]]:
        assert not self.closed
        if Judge.broken:
            raise RuntimeError("no")
        return [[] for _ in passages]

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Judge]]:
    family = Family("judge", "batch", {"BAD": Label(0.5, 1.0)}, lambda _: Judge())
    monkeypatch.setitem(FAMILIES, "judge", family)
    monkeypatch.setattr(Judge, "made", [])
    monkeypatch.setattr(Judge, "broken", False)
    return Judge


def policies(name: str, *rules: str, tenant: str | None = None) -> PolicySet:
    default = parse_policy(f"version: 2\nname: {name}\nprompt: [{', '.join(rules)}]", "p.yaml")
    if tenant is None:
        return PolicySet(default)
    return PolicySet(parse_policy(A, "a.yaml"), {tenant: default.model_copy(update={"tenant": tenant})})


PII, JUDGE = "{type: pii, action: flag}", "{type: judge, action: block}"


@pytest.fixture
def in_force() -> Policies:
    return Policies(Metrics(CollectorRegistry()))


async def test_engines_are_shared_a_removed_policys_too(judge: type[Judge], in_force: Policies) -> None:
    first = Generation.load(policies("first", JUDGE, tenant="a"))
    await in_force.put_in_force(first)
    second = Generation.load(policies("second", PII, JUDGE), first)
    await in_force.put_in_force(second)
    assert len(judge.made) == 1
    assert second.guards[None].stages.detectors == first.guards["a"].stages.detectors
    await in_force.close()
    assert judge.made[0].closed == 1


async def test_what_nobody_needs_is_closed_when_its_last_request_has_left(
    judge: type[Judge], in_force: Policies
) -> None:
    await in_force.put_in_force(Generation.load(policies("first", JUDGE)))
    with in_force.generation() as old:
        await in_force.put_in_force(Generation.load(policies("second", PII), in_force.current))
        await asyncio.sleep(0.01)
        assert old.guard_for(None).policy.name == "first"
        assert not judge.made[0].closed
    await asyncio.sleep(0.01)
    assert judge.made[0].closed == 1


async def test_what_a_later_generation_needs_stays(judge: type[Judge], in_force: Policies) -> None:
    await in_force.put_in_force(Generation.load(policies("first", JUDGE)))
    for name in ("second", "third"):
        await in_force.put_in_force(Generation.load(policies(name, JUDGE), in_force.current))
    await asyncio.sleep(0.01)
    assert [detector.closed for detector in judge.made] == [0]


async def test_a_model_that_does_not_work_keeps_its_policy_out(judge: type[Judge], in_force: Policies) -> None:
    await in_force.put_in_force(Generation.load(policies("first", PII)))
    judge.broken = True
    with pytest.raises(DetectorFailed, match=r"judge.*fails on a plain sentence"):
        await in_force.put_in_force(Generation.load(policies("second", JUDGE), in_force.current))
    with in_force.generation() as current:
        assert current.guard_for(None).policy.name == "first"
    assert judge.made[0].closed == 1


async def test_a_remote_judge_is_not_asked(
    judge: type[Judge], in_force: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "cost", "remote")
    judge.broken = True
    await in_force.put_in_force(Generation.load(policies("first", JUDGE)))


async def test_a_file_that_is_being_written_is_read_when_it_is_whole(in_force: Policies, tmp_path: Path) -> None:
    """Half of a policy may be a policy, and mean less."""
    file, reads = tmp_path / "policy.yaml", list[str]()
    file.write_text(A)

    def read() -> PolicySet:
        reads.append(file.read_text())
        return PolicySet(parse_policy(reads[-1], str(file)))

    await in_force.put_in_force(Generation.load(PolicySet(parse_policy(A, str(file)))))
    reload = Reload([file], read, in_force, Metrics(CollectorRegistry()), every_s=3600)  # the test looks in its place
    reload.start()
    try:
        with file.open("w") as writing:
            for line in B.splitlines(keepends=True):
                writing.write(line)
                writing.flush()
                await asyncio.to_thread(reload._look)
        assert reads == []
        await asyncio.to_thread(reload._look)
    finally:
        reload.stop()
    assert reads == [B]
    assert in_force.current is not None
    assert in_force.current.policies.default.name == "cards"


async def test_a_failed_reload_is_counted(judge: type[Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    in_force, file, named = Policies(metrics), tmp_path / "p.yaml", [policies("first", PII)]
    file.write_text("1")
    await in_force.put_in_force(Generation.load(named[0]))
    reload = Reload([file], lambda: named[-1], in_force, metrics, every_s=0.01)
    reload.start()
    try:
        judge.broken = True
        named.append(policies("second", JUDGE))
        os.utime(file, ns=(1, 1))
        await _until(lambda: registry.get_sample_value("guardrail_policy_reload_total", {"result": "failed"}) == 1)
        judge.broken = False
        os.utime(file, ns=(2, 2))
        await _until(lambda: registry.get_sample_value("guardrail_policy_reload_total", {"result": "ok"}) == 1)
    finally:
        reload.stop()
    assert in_force.current is not None
    assert in_force.current.policies.default.name == "second"


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  the counter has no event
            await asyncio.sleep(0.01)
