"""What a traffic rule may say, and what it comes to: hours, countries, estimates, what an answer has used."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.cli.policy import explained
from aim_guardrail.detectors.traffic import Countries, Hours
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.policy import PolicyError, parse_policy
from aim_guardrail.settings import GuardrailSettings
from aim_guardrail.traffic.business_hours import opens_in_s
from aim_guardrail.traffic.estimate import AnswerLength, answers_with_text, asked, text_bytes
from aim_guardrail.traffic.geo import RECHECK_S, GeoDatabase
from aim_guardrail.traffic.limits import caller_of, limits_of
from aim_guardrail.traffic.meter import Meter, tapped
from aim_guardrail.traffic.refusals import duration
from aim_kserve.identity import Caller
from aim_kserve.settings import SettingsError
from aim_kserve.sse import EventReader, sse
from guarded import eventually
from mmdb import write_countries


def policy(options: str, *, more: str = "", under: str = "prompt") -> str:
    return f"version: 2\nname: p\n{under}:\n  - type: traffic\n    action: block\n    options: {options}\n{more}"


# --- the policy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("{}", "a traffic rule limits nothing: give some of requests, tokens"),
        ("{requests: {}}", "requests.0: limits nothing: give minute, hour or day"),
        ("{requests: {minute: 0}}", "requests.0.minute: 0 is refused"),
        ("{requests: [{minute: 5}, {minute: 9}]}", "requests: a minute per caller is limited twice: give it once"),
        ("{requests: {second: 5}}", "requests.0.second: unknown key"),
        ("{requests: {minute: 5, per: tenant}}", "requests.0.per: 'tenant' is not allowed: use 'caller'"),
        ("{request: {minute: 5}}", "request: unknown key: did you mean 'requests'?"),
        ("{countries: {}}", "countries: give countries under allow, or under deny"),
        ("{countries: {allow: [DE], deny: [FR]}}", "countries: give countries under allow, or under deny"),
        ("{countries: {allow: [UK]}}", "countries.allow: unknown country 'UK': use ISO 3166-1 codes"),
        ("{countries: {allow: [NO]}}", "countries.allow: YAML reads NO as false"),
        ("{hours: {time_zone: Mars/Base}}", "hours.time_zone: unknown time zone 'Mars/Base': use an IANA name"),
        ("{hours: {opens: 8:00}}", "hours.opens: '480' is no time of day: use 'HH:MM', in quotes"),
        ("{hours: {opens: '08:00', closes: '08:00'}}", "hours: opens at 08:00 and closes at 08:00: it would never"),
        ("{hours: {days: [monday]}}", "hours.days.0: 'monday' is not allowed: use 'mon'"),
    ],
)
def test_a_wrong_option_is_named_with_its_remedy(options: str, says: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy(policy(options), "p.yaml")
    assert says in str(refused.value)
    assert str(refused.value).startswith("p.yaml:6")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("    threshold: 0.5\n", "type 'traffic' has no scores: remove threshold"),
        ("    timeout_ms: 5\n", "cannot time out"),
        ("    entities: [GEO]\n", "names GEO, which its options do not limit: remove it, or give the limit"),
        ("    entities: [SPEED]\n", "unknown entity 'SPEED': use some of REQUEST_RATE"),
        (
            "stream: {mode: buffer}\nanswer: [{type: traffic, action: block, options: {upload_bytes: 1}}]\n",
            "put it under",
        ),
    ],
)
def test_what_has_no_meaning_for_traffic_is_refused(more: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        parse_policy(policy("{upload_bytes: 100}", more=more), "p.yaml")


def test_nothing_can_be_redacted() -> None:
    with pytest.raises(PolicyError, match="nothing to redact: use block, flag or log"):
        parse_policy(policy("{upload_bytes: 1}").replace("block", "redact"), "p.yaml")


def test_a_limit_that_no_action_names_is_refused() -> None:
    with pytest.raises(PolicyError, match="limits REQUEST_RATE, which it does not name: name it, or remove"):
        parse_policy(policy("{requests: {minute: 1}, upload_bytes: 1}").replace("block", "{UPLOAD_SIZE: block}"), "p")


def test_in_a_stage_it_is_refused() -> None:
    rule = "{type: traffic, action: block, options: {upload_bytes: 1}}"
    with pytest.raises(PolicyError, match="put it outside the stage"):
        parse_policy(f"version: 2\nname: p\nprompt: [parallel: [{rule}]]\n", "p.yaml")


def test_the_annotation_means_what_comes() -> None:
    rules = "- {type: secrets, action: block}\n- {type: traffic, action: block, options: {requests: {minute: 5}}}"
    settings = GuardrailSettings.load(
        ["--predictor_host", "p", "--guardrails", rules], env={}, prog="t", description=""
    )
    (rule,) = settings.read_policies().default.traffic
    assert [(limit.name, limit.amount) for limit in limits_of([rule])] == [("requests_minute", 5)]


def test_countries_need_a_database(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(policy("{countries: {allow: [DE]}}"))
    flags = ["--predictor_host", "p", "--policy", str(file)]
    settings = GuardrailSettings.load(flags, env={}, prog="t", description="")
    with pytest.raises(PolicyError, match="give --geo_database FILE"):
        settings.read_policies()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--redis_url", "localhost:6379"], "redis_url"),
        (["--redis_url", "redis://u:hunter2@h:abc/0"], r"its port is no number .* \(got 'redis://\*\*\*@h:abc/0'\)"),
        (["--redis_url", "redis://h/0?socket_timeout=abc"], "options after . are not taken"),
        (["--redis_url", "redis://h:6379/abc"], "its database is no number"),
        (["--redis_timeout_ms", "0"], "redis_timeout_ms"),
        (["--limit_replicas", "0"], "limit_replicas"),
        (["--trusted_proxies", "10.0.0.1/8"], "host bits set: give addresses or networks, 10.0.0.0/8"),
        (["--trusted_proxies", "ingress"], "give addresses or networks"),
    ],
)
def test_wrong_settings_are_named(flags: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as refused:
        GuardrailSettings.load(["--predictor_host", "p", *flags], env={}, prog="t", description="")
    assert "hunter2" not in str(refused.value)


def test_every_limit_of_a_rule() -> None:
    rule = policy("{requests: {minute: 5, hour: 9}, tokens: [{day: 7}, {minute: 3, per: global}]}")
    both = parse_policy(rule, "p").traffic
    found = {(limit.name, limit.per, limit.amount) for limit in limits_of(both)}
    assert found == {
        ("requests_minute", "caller", 5),
        ("requests_hour", "caller", 9),
        ("tokens_day", "caller", 7),
        ("tokens_minute", "global", 3),
    }


def test_a_policy_is_explained() -> None:
    options = "{requests: [{minute: 5, per: caller_model}], countries: {deny: [DE]}, hours: {closes: '18:00'}}"
    text = policy(options).replace("block", "{GEO: flag, default: block}")
    assert list(explained(parse_policy(text, "p")))[1:5] == [
        "prompt:",
        "  as it comes: traffic blocks REQUEST_RATE: more than 5 a minute (caller and model)",
        "  as it comes: traffic flags GEO: from DE",
        "  as it comes: traffic blocks HOURS: outside of 00:00 to 18:00 on mon, tue, wed, thu, fri, sat, sun (UTC)",
    ]


def test_the_policys_version_changes_with_a_limit() -> None:
    versions = {parse_policy(policy(f"{{requests: {{minute: {n}}}}}"), "p").version_hash for n in (5, 6)}
    assert len(versions) == 2


# --- whose count ------------------------------------------------------------------------------------------------------


def test_a_key_tells_nobody_who_it_is() -> None:
    (limit,) = limits_of(parse_policy(policy("{requests: {minute: 5}}"), "p").traffic)
    keys = {limit.charge("m", caller, "m", 1).key for caller in ("tenant acme", "tenant acme2", "address 10.0.0.1")}
    assert len(keys) == 3
    assert all(set(key) <= set("0123456789abcdef") and len(key) == 32 for key in keys)
    assert limit.charge("m", "tenant acme", "other", 1).key in keys
    assert limit.charge("n", "tenant acme", "m", 1).key not in keys


@pytest.mark.parametrize(("per", "counts"), [("caller", 2), ("model", 2), ("caller_model", 4), ("global", 1)])
def test_whose_requests_are_counted_together(per: str, counts: int) -> None:
    (limit,) = limits_of(parse_policy(policy(f"{{requests: {{minute: 5, per: {per}}}}}"), "p").traffic)
    keys = {limit.charge("s", caller, model, 1).key for caller in "ab" for model in "xy"}
    assert len(keys) == counts


def test_a_tenant_is_itself_from_wherever_and_an_ipv6_network_is_one_caller() -> None:
    tenant = Caller("key-1", "acme", frozenset({"infer"}))
    assert caller_of(RequestContext("/", caller=tenant, client="10.0.0.1")) == "tenant acme"
    by_address = [caller_of(RequestContext("/", client=client)) for client in ("2001:db8::1", "2001:db8::ffff:2")]
    assert by_address[0] == by_address[1] != caller_of(RequestContext("/", client="2001:db8:0:1::1"))
    assert caller_of(RequestContext("/", client="10.0.0.1")) != caller_of(RequestContext("/", client="10.0.0.2"))


# --- hours ------------------------------------------------------------------------------------------------------------

WEEK = ("mon", "tue", "wed", "thu", "fri")
OFFICE = Hours(time_zone="Europe/Berlin", days=WEEK, opens="08:00", closes="18:00")
NIGHT = Hours(time_zone="America/New_York", days=("fri",), opens="22:00", closes="06:00")


def at(text: str, zone: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("hours", "now", "opens"),
    [
        (OFFICE, "2026-03-04 08:00:00", None),
        (OFFICE, "2026-03-04 17:59:59", None),
        (OFFICE, "2026-03-04 18:00:00", "2026-03-05 08:00:00"),
        (OFFICE, "2026-03-04 07:59:59", "2026-03-04 08:00:00"),
        (OFFICE, "2026-03-06 18:30:00", "2026-03-09 08:00:00"),  # over a weekend
        (OFFICE, "2026-03-27 18:30:00", "2026-03-30 08:00:00"),  # over one whose clocks go forward
        (OFFICE, "2026-10-23 18:30:00", "2026-10-26 08:00:00"),  # and back
        (NIGHT, "2026-03-06 21:59:00", "2026-03-06 22:00:00"),
        (NIGHT, "2026-03-06 23:00:00", None),
        (NIGHT, "2026-03-07 05:59:59", None),  # it opened yesterday
        (NIGHT, "2026-03-07 06:00:00", "2026-03-13 22:00:00"),
        (NIGHT, "2026-03-06 05:00:00", "2026-03-06 22:00:00"),
        (Hours(), "2026-03-06 05:00:00", None),
    ],
)
def test_when_it_opens(hours: Hours, now: str, opens: str | None) -> None:
    zone = hours.time_zone
    expected = at(opens, zone) - at(now, zone) if opens else 0
    assert opens_in_s(hours, at(now, zone)) == expected


@given(st.floats(1.5e9, 2e9), st.sampled_from([OFFICE, NIGHT]))
def test_it_is_open_when_it_says_it_will_be(now_s: float, hours: Hours) -> None:
    wait_s = opens_in_s(hours, now_s)
    assert 0 <= wait_s <= 8 * 86400
    assert opens_in_s(hours, now_s + wait_s + 0.01) == 0


# --- countries --------------------------------------------------------------------------------------------------------


def test_countries_of_addresses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    file = write_countries(tmp_path / "geo.mmdb", {"203.0.113.0/24": "DE", "2001:db8::/32": "FR", "10.1.0.0/16": "US"})
    database = GeoDatabase(file, clock=lambda: now[0])
    asked_for = ["203.0.113.7", "2001:db8::7", "10.1.2.3", "10.2.0.1", "::ffff:203.0.113.7", "no address", None]
    assert [database.country(each) for each in asked_for] == ["DE", "FR", "US", None, "DE", None, None]
    new = write_countries(tmp_path / "new.mmdb", {"203.0.113.0/24": "AT"})
    os.replace(new, file)
    assert database.country("203.0.113.7") == "DE"
    now[0] += RECHECK_S
    assert eventually(lambda: database.country("203.0.113.7") == "AT")
    file.write_bytes(b"broken")
    now[0] += RECHECK_S
    assert database.country("203.0.113.7") == "AT"
    assert eventually(lambda: "the last good one serves" in caplog.text)
    assert database.country("203.0.113.7") == "AT"
    database.close()


def test_a_database_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.mmdb").write_text("no database")
    for name in ("none.mmdb", "absent.mmdb"):
        with pytest.raises(ValueError, match=r"cannot be read .* give a MaxMind database"):
            GeoDatabase(tmp_path / name)


@pytest.mark.parametrize("metadata", [b"", b"\xe0", b"\xe1\x43abc\x43abc", b"\x42\xff\xfe", b"\x20\x00", b"\xa1\x05"])
def test_a_database_whose_description_is_broken_is_named(tmp_path: Path, metadata: bytes) -> None:
    (tmp_path / "geo.mmdb").write_bytes(b"\0" * 64 + b"\xab\xcd\xefMaxMind.com" + metadata)
    with pytest.raises(ValueError, match=r"cannot be read .* give a MaxMind database"):
        GeoDatabase(tmp_path / "geo.mmdb")


def test_no_writer_of_a_pipe_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "geo.mmdb")
    with pytest.raises(ValueError, match=r"cannot be read \(no regular file"):
        GeoDatabase(tmp_path / "geo.mmdb")


def test_who_is_permitted() -> None:
    allow, deny = Countries(allow=("DE", "FR")), Countries(deny=("DE",), unknown="allow")
    assert [allow.permits(each) for each in ("DE", "US", None)] == [True, False, False]
    assert [deny.permits(each) for each in ("DE", "US", None)] == [False, True, True]


# --- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "prompt", "answer"),
    [
        ({"model": "m" * 4, "prompt": "x" * 36}, 10, None),
        ({"prompt": "x" * 40, "max_tokens": 7}, 10, 7),
        ({"prompt": ["x" * 40, "y" * 40], "max_tokens": 7, "n": 3}, 20, 42),
        ({"prompt": [1, 2, 3], "max_tokens": 7}, 3, 7),
        ({"prompt": [[1, 2, 3], [4]], "max_tokens": 7}, 4, 14),
        ({"messages": [{"content": "日本語" * 4}], "max_completion_tokens": 5, "max_tokens": 900}, 9, 5),
        ({"input": "x" * 40, "max_output_tokens": 5}, 10, 5),
        ({"prompt": "x" * 40, "max_tokens": -1}, 10, None),
        ({"prompt": "x" * 40, "max_tokens": "many"}, 11, None),
        ({"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 4000}}]}]}, 0, None),
        ({"instances": ["x" * 40], "parameters": {"max_tokens": 9}}, 10, 9),
        (["x" * 40], 10, None),
    ],
)
def test_what_is_asked_for(body: object, prompt: int, answer: int | None) -> None:
    found = asked(body)
    assert (found.prompt, found.answer) == (prompt, answer)


def test_a_deep_body_is_no_danger() -> None:
    deep: object = "x"
    for _ in range(50_000):
        deep = [deep]
    assert text_bytes(deep) == 1


def test_lengths_of_answers_are_learnt() -> None:
    length = AnswerLength()
    for _ in range(200):
        length.learn(20)
    assert length.tokens == 20
    assert answers_with_text("chat/completions")
    assert not answers_with_text("embeddings")


# --- what an answer has used ------------------------------------------------------------------------------------------


def chunk(text: str = "", usage: dict[str, int] | None = None) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}}] if text else []
    return sse(orjson.dumps({"id": "chatcmpl-123456", "choices": choices, "usage": usage}))


def metered(*events: bytes, prompt: int = 10) -> Meter:
    meter = Meter(prompt)
    meter.events(EventReader().feed(b"".join(events)))
    return meter


def test_a_stream_counts_as_it_comes_until_its_usage_tells() -> None:
    begun = metered(*[chunk(" word")] * 8)
    assert (begun.total, begun.is_told) == (10 + 10, False)  # 40 bytes
    assert metered(*[chunk("a")] * 8).total == 10 + 8  # no piece is less than a token
    usage = {"prompt_tokens": 21, "completion_tokens": 8, "total_tokens": 29}
    whole = metered(*[chunk(" word")] * 8, chunk(usage=usage), b"data: [DONE]\n\n")
    assert (whole.total, whole.is_told) == (29, True)


def test_usage_that_comes_with_every_piece_is_the_latest() -> None:
    pieces = [chunk(" word", {"prompt_tokens": 5, "completion_tokens": n}) for n in (1, 2, 3)]
    assert metered(*pieces).total == 8


def test_responses_events() -> None:
    delta = sse(b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"abcdefgh"}')
    repeated = sse(b'event: x\ndata: {"type":"response.output_text.done","text":"abcdefgh"}')
    done = {"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 2}}}
    assert metered(delta, delta, repeated).total == 10 + 4
    assert metered(delta, delta, repeated, sse(orjson.dumps(done))).total == 5


def test_anthropics_events() -> None:
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 30, "output_tokens": 1}}}
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "abcdefgh"}}
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}
    events = [sse(orjson.dumps(each)) for each in (start, delta, delta, end)]
    assert metered(*events[:3]).total == 31 + 4
    assert metered(*events).total == 45


def test_nonsense_costs_nothing_and_breaks_nothing() -> None:
    odd = [b"data: {\n\n", b"data: 7\n\n", b'data: {"choices": null, "usage": 3}\n\n', b": ping\n\n"]
    assert (
        metered(*odd, b'data: {"choices":[{"delta":{"content":null}}],"usage":{"completion_tokens":-4}}\n\n').total
        == 10
    )


@pytest.mark.parametrize(
    ("body", "total"),
    [
        ({"choices": [{"message": {"content": "x" * 40}}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}, 7),
        ({"choices": [{"message": {"role": "assistant", "content": "x" * 40}}]}, 20),
        ({"predictions": ["x" * 40]}, 20),
        ({"data": [{"embedding": [0.5] * 100}], "usage": {"prompt_tokens": 6, "total_tokens": 6}}, 6),
        ("x" * 40, 20),
    ],
)
@pytest.mark.parametrize("cut", [7, 10_000])
async def test_a_body_that_passes_unread(body: object, total: int, cut: int) -> None:
    raw, meter = orjson.dumps(body), Meter(10)

    async def chunks():
        for start in range(0, len(raw), cut):
            yield raw[start : start + cut]

    passed = b"".join([each async for each in tapped(chunks(), meter, b"application/json")])
    assert passed == raw
    assert meter.total == total


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0s"), (17, "17ms"), (1000, "1s"), (1001, "2s"), (360_000, "6m0s"), (3_601_000, "1h0m1s")],
)
def test_durations_as_openai_writes_them(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text
