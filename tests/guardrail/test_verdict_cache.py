"""Verdicts remembered: what is, for whom and for how long; one look at a time; and a Redis that dies in the middle."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from aim_guardrail.detectors.base import Asked, Finding, Passage
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline.cache import MOST_CHARS, MOST_FINDINGS, VerdictCache, is_small, keys_of
from aim_guardrail.pipeline.failures import DetectorFailed
from aim_guardrail.pipeline.shared_cache import SharedCache
from aim_guardrail.pipeline.stages import Judgement, Stages
from aim_guardrail.policy import parse_policy
from fake_predictor import FakePredictor
from guarded import eventually, metric
from real_redis import RealRedis
from scripted_detectors import FAMILY, Scripted
from scripted_guardrail import serving

BAD = Finding("scripted", "BAD", 0, 3, 0.9, "script")


class Counted:
    """What a cache asks; `asked`: about which keys."""

    def __init__(self, keys: Sequence[bytes], finds: Sequence[Finding] = (BAD,), seconds: float = 0) -> None:
        self.keys, self.finds, self.seconds = keys, finds, seconds
        self.asked: list[list[bytes]] = []

    async def __call__(self, missing: Sequence[int]) -> list[list[Finding]]:
        self.asked.append([self.keys[at] for at in missing])
        await asyncio.sleep(self.seconds)
        return [list(self.finds) for _ in missing]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


async def look(cache: VerdictCache, ask: Counted, metrics: Metrics, seconds: float = 5) -> list[list[Finding]]:
    return await cache.found(ask.keys, ask, time.monotonic() + seconds, metrics)


# --- in memory --------------------------------------------------------------------------------------------------


async def test_is_asked_once_and_forgets_in_time(metrics: Metrics, registry: CollectorRegistry):
    now = [0.0]
    cache, ask = VerdictCache(ttl_s=10, clock=lambda: now[0]), Counted([b"a", b"b", b"a"])
    assert await look(cache, ask, metrics) == [[BAD], [BAD], [BAD]]
    assert ask.asked == [[b"a", b"b"]]
    assert await look(cache, ask, metrics) == [[BAD], [BAD], [BAD]]
    now[0] = 10
    await look(cache, ask, metrics)
    assert ask.asked == [[b"a", b"b"]] * 2
    assert registry.get_sample_value("guardrail_cache_total", {"tier": "l1", "result": "hit"}) == 2
    assert registry.get_sample_value("guardrail_cache_total", {"tier": "l1", "result": "miss"}) == 4


async def test_holds_so_many_and_lets_the_one_longest_unused_go(metrics: Metrics):
    cache = VerdictCache(entries=2)
    for key in (b"a", b"b", b"a", b"c"):
        await look(cache, Counted([key]), metrics)
    again = {key: Counted([key]) for key in (b"a", b"c", b"b")}
    for ask in again.values():
        await look(cache, ask, metrics)
    assert [key for key, ask in again.items() if ask.asked] == [b"b"]


async def test_what_is_found_by_heaps_is_not_remembered(metrics: Metrics):
    cache, ask = VerdictCache(), Counted([b"a"], [BAD] * (MOST_FINDINGS + 1))
    assert len((await look(cache, ask, metrics))[0]) == MOST_FINDINGS + 1
    await look(cache, ask, metrics)
    assert len(ask.asked) == 2


async def test_who_asks_at_the_same_time_waits_for_the_first(metrics: Metrics, registry: CollectorRegistry):
    cache, ask = VerdictCache(), Counted([b"a"], seconds=0.05)
    assert await asyncio.gather(*(look(cache, ask, metrics) for _ in range(20))) == [[[BAD]]] * 20
    assert len(ask.asked) == 1
    assert registry.get_sample_value("guardrail_cache_total", {"tier": "flight", "result": "hit"}) == 19


async def test_two_that_wait_for_each_other_both_end(metrics: Metrics):
    cache = VerdictCache()
    one, other = Counted([b"a", b"b"], seconds=0.02), Counted([b"b", b"c", b"a"], seconds=0.02)
    found = await asyncio.gather(look(cache, one, metrics), look(cache, other, metrics))
    assert found == [[[BAD]] * 2, [[BAD]] * 3]
    assert one.asked + other.asked == [[b"a", b"b"], [b"c"]]


async def test_a_first_that_fails_or_leaves_is_followed_by_the_next(metrics: Metrics):
    cache, ask, done = VerdictCache(), Counted([b"a"], seconds=0.02), []

    async def fails(_: Sequence[int]) -> list[list[Finding]]:
        await asyncio.sleep(0.02)
        done.append("failed")
        raise RuntimeError

    leaver = asyncio.ensure_future(look(cache, Counted([b"a"], seconds=60), metrics))
    await asyncio.sleep(0)
    failing = asyncio.ensure_future(cache.found([b"a"], fails, time.monotonic() + 5, metrics))
    followers = [asyncio.ensure_future(look(cache, ask, metrics)) for _ in range(5)]
    await asyncio.sleep(0.01)
    leaver.cancel()
    assert await asyncio.gather(*followers) == [[[BAD]]] * 5
    with pytest.raises(RuntimeError):
        await failing
    assert (len(ask.asked), done) == (1, ["failed"])


async def test_nobody_waits_for_another_longer_than_there_is_time(metrics: Metrics):
    cache = VerdictCache()
    slow = asyncio.ensure_future(look(cache, Counted([b"a"], seconds=30), metrics))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await look(cache, Counted([b"a"]), metrics, 0.02)
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)


def test_a_key_is_of_everything_that_may_matter():
    passages = [
        Passage("text", "prompt", "user", "key"),
        Passage("Text", "prompt", "user", "key"),
        Passage("text", "answer", "user", "key"),
        Passage("text", "prompt", "tool", "key"),
        Passage("text", "prompt", "user", ""),
        Passage("text", "prompt", "use", "rkey"),
        Passage("keytext", "prompt", "user", ""),
        Passage("\ud800", "prompt"),
    ]
    scopes = [("rule", "digest", "tenant"), ("rule", "digest", ""), ("rule", "digestt", "enant"), ("", "", "")]
    keys = [key for scope in scopes for key in keys_of(scope, passages)]
    assert len(set(keys)) == len(keys) == len(passages) * len(scopes)
    assert {len(key) for key in keys} == {32}
    assert keys_of(scopes[0], passages) == keys[: len(passages)]


def test_what_is_long_is_not_hashed():
    assert is_small([Passage("x" * MOST_CHARS, "prompt")])
    assert not is_small([Passage("x" * MOST_CHARS, "prompt"), Passage("y", "prompt")])
    assert not is_small([Passage("x", "prompt")] * 2000)


# --- in the stages ----------------------------------------------------------------------------------------------


def stages(monkeypatch: pytest.MonkeyPatch, rule: str, reuse: Stages | None = None) -> Stages:
    monkeypatch.setitem(FAMILIES, "scripted", FAMILY)
    policy = parse_policy(f"version: 2\nname: p\nbudget_ms: 5000\nprompt: [{{type: scripted, {rule}}}]\n", "p")
    return Stages.load(policy, reuse)


class Judge:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._cache = metrics, VerdictCache()

    async def __call__(self, stages: Stages, text: str, tenant: str = "") -> Judgement:
        asked = Asked(time.monotonic() + 5, (), tenant)
        return await stages.judge("prompt", [Passage(text, "prompt")], asked, self._metrics, None, self._cache)


@pytest.fixture
def judged(metrics: Metrics) -> Judge:
    return Judge(metrics)


def asked(stages: Stages) -> int:
    (bounded,) = stages.detectors.values()
    assert isinstance(bounded.detector, Scripted)
    return len([what for what, _ in bounded.detector.did if what == "asked"])


SAFE = "action: block, options: {name: d, cacheable: true}"


async def test_only_who_says_it_is_safe_is_remembered(judged: Judge, monkeypatch: pytest.MonkeyPatch):
    safe = stages(monkeypatch, SAFE)
    unsafe = stages(monkeypatch, "action: block, options: {name: d}")
    for _ in range(3):
        for each in (safe, unsafe):
            assert (await judged(each, "d=bad")).blocked
    assert (asked(safe), asked(unsafe)) == (1, 3)


async def test_tenants_and_rules_share_nothing(judged: Judge, monkeypatch: pytest.MonkeyPatch):
    one = stages(monkeypatch, SAFE)
    for tenant in ("", "a", "b", "a", "b", ""):
        await judged(one, "d=bad", tenant)
    assert asked(one) == 3
    other = stages(monkeypatch, SAFE + ", threshold: 0.95", reuse=one)
    assert not (await judged(other, "d=bad")).blocked
    assert asked(other) == 4


async def test_what_failed_or_was_late_is_asked_again(
    judged: Judge, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
):
    failing = stages(monkeypatch, SAFE + ", timeout_ms: 50")
    for text in ("d=fail", "d=fail", "d=sleep:30", "d=sleep:30", "d=denied", "d=denied"):
        with pytest.raises(DetectorFailed):
            await judged(failing, text)
    assert asked(failing) == 6
    for _ in range(2):
        await judged(failing, "well")
    assert registry.get_sample_value("guardrail_skipped_total", {"detector": "scripted", "reason": "cache"}) == 1


async def test_a_cache_outlives_its_policy(judged: Judge, monkeypatch: pytest.MonkeyPatch):
    before = stages(monkeypatch, SAFE)
    await judged(before, "d=bad")
    after = Stages.load(before.policy, before)
    assert (await judged(after, "d=bad")).blocked
    assert asked(after) == 1


# --- in Redis ---------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> RealRedis:
    return RealRedis(tmp_path)


async def shared_value(shared: SharedCache, key: bytes, metrics: Metrics) -> object:
    """What Redis has, once it is asked in peace: the first look makes the connection."""
    for _ in range(100):
        if found := await shared.get([key], metrics):
            return found[key]
        await asyncio.sleep(0.02)
    return None


@pytest.mark.system
async def test_replicas_share_what_they_found_and_no_text(redis: RealRedis, metrics: Metrics):
    with redis:
        one, other = (SharedCache(redis.url) for _ in range(2))
        (key,) = keys_of(["rule"], [Passage("my own words", "prompt")])
        ask = Counted([key])
        await look(VerdictCache(shared=one), ask, metrics)
        assert len(ask.asked) == 1
        assert await shared_value(other, key, metrics) == (BAD,)
        for _ in range(100):  # on a busy machine an answer may take more than its 5 ms
            again = Counted([key])
            assert await look(VerdictCache(shared=other), again, metrics) == [[BAD]]
            if not again.asked:
                break
        assert again.asked == []
        (name,) = redis.client.keys()  # type: ignore[misc]
        held: bytes = redis.client.get(name)  # type: ignore[assignment]
        assert b"words" not in name + held
        assert 0 < redis.client.ttl(name) <= 300  # type: ignore[operator]
        await one.close()
        await other.close()


@pytest.mark.system
@pytest.mark.parametrize(
    "value", [b"", b"junk", b"[]", b'[["scripted","BAD",0,3,7.5,"s"]]', b'[["scripted"]]', b"{}", b"null"]
)
async def test_what_others_wrote_there_is_no_verdict(redis: RealRedis, metrics: Metrics, value: bytes):
    with redis:
        shared, key = SharedCache(redis.url), b"k" * 32
        shared.put({key: (BAD,)}, 60)
        assert await shared_value(shared, key, metrics) == (BAD,)
        (name,) = redis.client.keys()  # type: ignore[misc]
        redis.client.set(name, value if value == b"[]" else key + value)
        if value == b"{}":
            assert await shared.get([key], metrics) == {key: ()}
        else:
            assert await shared.get([key], metrics) == {}
        await shared.close()


@pytest.mark.system
def test_redis_dies_in_the_middle_and_nothing_fails(redis: RealRedis, predictor: FakePredictor, tmp_path: Path):
    policy = f"budget_ms: 5000\nprompt: [{{type: scripted, {SAFE}}}]\n"
    with redis, serving(policy, tmp_path, predictor.host, "--redis_url", redis.url) as guarded:

        def ask_all(which: str) -> list[int]:
            return [guarded(f"{which} {n % 7} {'d=bad' * (n % 2)}").status_code for n in range(28)]

        right = [200, 400] * 14
        assert ask_all("before") == right
        assert eventually(lambda: len(redis.client.keys()) == 14)  # type: ignore[arg-type]
        assert metric(guarded.server, "guardrail_cache_total", tier="l1", result="hit") >= 14
        redis.signal(signal.SIGSTOP)  # it hangs
        assert ask_all("hanging") == right
        redis.signal(signal.SIGCONT)
        redis.kill()
        assert ask_all("dead") == right
        assert metric(guarded.server, "guardrail_cache_total", tier="l2", result="error") > 0
        assert "Redis shares no verdicts" in guarded.server.stderr()
        redis.start()
        new = itertools.count()
        assert eventually(lambda: guarded(f"again {next(new)}").status_code == 200 and redis.client.keys(), within_s=40)
        assert "Traceback" not in guarded.server.stderr()


@pytest.mark.system
def test_another_replica_knows_what_the_first_found(redis: RealRedis, predictor: FakePredictor, tmp_path: Path):
    policy = f"budget_ms: 5000\nprompt: [{{type: scripted, {SAFE}}}]\n"
    with redis, serving(policy, tmp_path, predictor.host, "--redis_url", redis.url) as one:
        texts = [f"{n} d=bad" for n in range(50)]
        assert {one(text).status_code for text in texts} == {400}
        assert eventually(lambda: len(redis.client.keys()) > 25)  # type: ignore[arg-type]
        with serving(policy, tmp_path, predictor.host, "--redis_url", redis.url) as other:
            assert {other(text).status_code for text in texts} == {400}
            hits = metric(other.server, "guardrail_cache_total", tier="l2", result="hit")
            assert hits == metric(other.server, "guardrail_skipped_total", reason="cache") > 0
            asked_anew = [line for line in other.did() if line == "d asked"]
            assert len(asked_anew) == 1 + 50 - hits  # the first is what every detector is tried with
