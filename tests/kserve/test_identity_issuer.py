"""Tokens and their issuer's keys: pinned by the settings, followed at a bounded pace, and kept while it is away."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import issuer as provider
from aim_kserve.errors import StartupError, Unauthorized
from aim_kserve.identity import jwks, tokens
from aim_kserve.identity.caller import Caller
from aim_kserve.identity.issuer import Issuer
from aim_kserve.settings import ServerSettings, SettingsError
from guarded import eventually
from served import Served


@pytest.fixture
def away() -> Iterator[provider.Issuer]:
    with provider.Issuer("ES256") as it:
        yield it


def configured(it: provider.Issuer, *flags: str) -> ServerSettings:
    return ServerSettings.load(it.flags(*flags), {}, prog="test", description="")


async def followed(it: provider.Issuer, *flags: str) -> Issuer:
    ours = await asyncio.to_thread(Issuer, configured(it, *flags))
    ours.follower.start()
    return ours


async def code(ours: Issuer, token: str) -> str:
    try:
        return (await ours.verified(token)).caller.credential_id
    except Unauthorized as error:
        return str(error.code)


# --- an issuer that is away, late, or has other keys -----------------------------------------------------------------


async def test_known_keys_keep_working_while_the_issuer_is_away(away: provider.Issuer) -> None:
    ours = await followed(away, "--jwt_refresh_s", "1", "--jwt_cooldown_s", "0.1")
    token = away.token()
    away.stop()
    assert eventually(lambda: not ours.is_ok)
    assert await code(ours, token) == "jwt:alice"
    assert await code(ours, away.token(sub="new")) == "jwt:new"
    away.start(away.port)
    assert eventually(lambda: ours.is_ok)
    ours.follower.stop()


async def test_a_new_key_is_fetched_once_and_an_old_one_refused_after(away: provider.Issuer) -> None:
    ours = await followed(away, "--jwt_cooldown_s", "0.3", "--jwt_refresh_s", "3600")
    old = away.token()
    assert await code(ours, old) == "jwt:alice"
    away.add("next")
    del away.keys["es256"]
    await asyncio.sleep(0.35)
    said = await asyncio.gather(*(code(ours, away.token(sub=f"{number}")) for number in range(20)))
    assert set(said) == {f"jwt:{number}" for number in range(20)}
    assert away.asked == 2
    assert await code(ours, old) == "unknown_key"  # though it had been verified before
    ours.follower.stop()


async def test_made_up_key_ids_are_no_flood(away: provider.Issuer) -> None:
    ours = await followed(away, "--jwt_cooldown_s", "3600")
    stranger = provider.Issuer()
    for number in range(20):
        stranger.add(f"{number}")
    for number in range(20):
        assert await code(ours, stranger.token(f"{number}")) == "unknown_key"
    assert away.asked == 1
    ours.follower.stop()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b""),
        (302, b""),
        (200, b"no JSON"),
        (200, b"[]"),
        (200, b'{"keys": []}'),
        (200, b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "es256"}]}'),
        (200, b" " * (jwks.MAX_BYTES + 1)),
        (200, orjson.dumps({"keys": [{}] * (jwks.MAX_KEYS + 1)})),
        (200, b"[" * 100_000),
    ],
    ids=["fails", "elsewhere", "not JSON", "no object", "no key", "a secret", "huge", "too many", "deep"],
)
def test_what_is_no_jwks_leaves_the_keys_as_they_are(away: provider.Issuer, status: int, body: bytes) -> None:
    source = jwks.Jwks(away.url, ["ES256"], refresh_s=3600, cooldown_s=0)
    source.start()
    before = source.keys
    away.status, away.body = status, body
    assert source.ask() is not None
    source.look()
    assert source.keys is before
    assert not source.is_ok


async def test_a_slow_issuer_is_given_up_and_holds_up_nobody(away: provider.Issuer) -> None:
    away.delay_s = 2
    with pytest.raises(jwks.JwksError, match=r"within 0.2 s"):
        await jwks.fetch(away.url, 0.2)
    away.delay_s = 0
    ours = await followed(away, "--jwt_cooldown_s", "0.1")
    away.delay_s = 1
    await asyncio.sleep(0.15)
    away.add("next")
    waiting = asyncio.create_task(code(ours, away.token("next")))
    await asyncio.sleep(0.05)
    assert await code(ours, away.token("es256")) == "jwt:alice"
    assert not waiting.done()
    assert await waiting == "jwt:alice"
    ours.follower.stop()


def test_a_file_of_keys_is_followed(tmp_path: Path, away: provider.Issuer) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(away.jwks())
    source = jwks.Jwks(str(file), ["ES256"], refresh_s=3600, cooldown_s=3600)
    source.start()
    away.add("next")
    file.write_bytes(away.jwks())
    source.look()
    assert source.keys.ids == {"es256", "next"}
    file.unlink()
    source.look()
    assert source.keys.ids == {"es256", "next"}
    assert not source.is_ok


# --- a start without the issuer --------------------------------------------------------------------------------------


def test_a_start_without_the_issuer_serves_with_the_last_good_set(tmp_path: Path, away: provider.Issuer) -> None:
    cache = tmp_path / "jwks.json"
    flags = away.flags("--jwks_cache", str(cache), "--jwt_cooldown_s", "0.5")
    Issuer(configured(away, "--jwks_cache", str(cache)))
    assert cache.stat().st_mode & 0o777 == 0o600
    away.stop()
    bearer = {"authorization": f"Bearer {away.token()}"}
    with Served.fake(*flags) as server:
        assert httpx.get(server.url + "/v1/models", headers=bearer).status_code == 200
        assert f"serving with the last good set of {cache}" in server.stderr()
        away.start(away.port)
        assert eventually(lambda: "read again, 1 keys" in server.stderr())


def test_a_start_without_the_issuer_and_a_last_good_set_is_refused(tmp_path: Path, away: provider.Issuer) -> None:
    cache = tmp_path / "jwks.json"
    away.stop()
    with pytest.raises(StartupError, match=r"cannot be fetched .*: start when it is there, or give --jwks_cache FILE"):
        Issuer(configured(away))
    for kept in (None, b"{", b"[]", b'{"version": 2}', b'{"version": 1, "source": "https://other", "jwks": {}}'):
        if kept is not None:
            cache.write_bytes(kept)
        with pytest.raises(StartupError, match=r"has no last good set \("):
            Issuer(configured(away, "--jwks_cache", str(cache)))


def test_the_other_half_of_a_key_is_not_kept(tmp_path: Path, away: provider.Issuer) -> None:
    name, key = away.keys["es256"]
    private = jwt.get_algorithm_by_name(name).to_jwk(key, as_dict=True)
    away.body = orjson.dumps({"keys": [{**private, "kid": "es256"}]})
    cache = tmp_path / "jwks.json"
    Issuer(configured(away, "--jwks_cache", str(cache)))
    assert private["d"] not in cache.read_text()
    assert private["x"] in cache.read_text()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--jwt_issuer", "i"], "--jwt_issuer without --jwt_audience, --jwt_jwks"),
        (["--jwt_audience", "a", "--jwt_jwks", "f"], "--jwt_audience, --jwt_jwks without --jwt_issuer"),
        (["--jwt_leeway_s", "5"], "--jwt_leeway_s without --jwt_issuer, --jwt_audience, --jwt_jwks"),
        (["--jwt_algorithms", "HS256"], "--jwt_algorithms: 'HS256' is not taken: give some of RS256"),
        (["--jwt_algorithms", "none"], "'none' is not taken"),
        (["--jwt_algorithms", ""], "none is given"),
        (["--jwt_leeway_s", "61"], "--jwt_leeway_s: "),
        (["--jwt_default_scopes", "root"], "--jwt_default_scopes: "),
        (["--jwt_jwks", "ftp://h/x"], "--jwt_jwks: must be https://HOST/PATH or a file"),
        (["--jwt_jwks", "https://u:p@h/x"], "--jwt_jwks: must be https://HOST/PATH or a file"),
        (
            ["--jwt_issuer", "i", "--jwt_audience", "a", "--jwt_jwks", "f", "--jwks_cache", "g"],
            "--jwks_cache is for keys from an URL",
        ),
    ],
)
def test_half_a_configuration_is_refused(flags: list[str], told: str) -> None:
    with pytest.raises(SettingsError) as refused:
        ServerSettings.load(flags, {}, prog="test", description="")
    assert told in str(refused.value)


# --- what a token says -----------------------------------------------------------------------------------------------


def said(claims: dict[str, Any], *flags: str) -> Caller:
    return tokens.caller_of(claims, configured(provider_with_url(), *flags))


def provider_with_url() -> provider.Issuer:
    it = provider.Issuer()
    it.url = "https://issuer.example/jwks"
    return it


def test_claims_become_a_caller() -> None:
    flags = ["--jwt_tenant_claim", "org.name", "--jwt_class_claim", "https://aim/class", "--jwt_models_claim", "models"]
    flags += ["--jwt_scope_claim", "roles", "--jwt_scope_prefix", "aim:"]
    claims = {"sub": "bob", "org": {"name": "acme"}, "https://aim/class": "low", "models": ["llama-*"]}
    claims["roles"] = ["aim:infer", "admin", "aim:metrics", 7]
    caller = said(claims, *flags)
    assert caller == Caller("jwt:bob", "acme", frozenset({"infer", "metrics"}), "low", ("llama-*",))
    assert not said({**claims, "models": None}, *flags).may_use("llama-1")
    assert said({"sub": "bob", "scope": "openid"}).scopes == frozenset()
    assert said({"sub": "bob", "scope": "openid"}, "--jwt_default_scopes", "infer").scopes == {"infer"}
    assert said({"sub": "bob", "scope": "metrics"}, "--jwt_default_scopes", "infer").scopes == {"metrics"}


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"sub": 7},
        {"sub": ""},
        {"sub": "x" * 129},
        {"sub": "a\nb"},
        {"sub": "a", "class": "gold"},
        {"sub": "a", "class": ["high"]},
    ],
)
def test_claims_that_are_not_as_configured_are_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(Unauthorized, match=r"claim '(sub|class)' must be") as refused:
        said(claims, "--jwt_class_claim", "class")
    assert refused.value.code == "wrong_claims"


# --- tokens of attackers ---------------------------------------------------------------------------------------------


def forged(header: dict[str, Any], claims: bytes, secret: bytes | None = None) -> str:
    parts = [base64.urlsafe_b64encode(part).rstrip(b"=") for part in (orjson.dumps(header), claims)]
    signed = b".".join(parts)
    signature = hmac.digest(secret, signed, "sha256") if secret is not None else b""
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.fixture(scope="module")
def known() -> Iterator[tuple[provider.Issuer, tokens.Tokens]]:
    with provider.Issuer("ES256", "RS256") as it:
        keys = jwks.parse(it.jwks(), ["RS256", "ES256", "EdDSA"])
        yield it, tokens.Tokens(configured(it), lambda: keys)


def test_no_header_chooses_how_it_is_verified(known: tuple[provider.Issuer, tokens.Tokens]) -> None:
    it, ours = known
    now = int(time.time())
    claims = orjson.dumps({"iss": provider.ISSUER, "aud": provider.AUDIENCE, "sub": "eve", "exp": now + 300})
    public = it.jwks()
    for header, secret, expected in (
        ({"alg": "none", "kid": "es256"}, None, "wrong_algorithm"),
        ({"alg": "", "kid": "es256"}, None, "wrong_algorithm"),
        ({"kid": "es256"}, None, "wrong_algorithm"),
        ({"alg": "HS256", "kid": "es256"}, public, "wrong_algorithm"),
        ({"alg": "RS256", "kid": "es256"}, public, "wrong_algorithm"),
        ({"alg": "PS256", "kid": "rs256"}, public, "wrong_algorithm"),
        ({"alg": "ES256", "kid": "es256"}, public, "wrong_signature"),
        ({"alg": "ES256", "kid": "other", "jwk": {}, "jku": "http://evil"}, public, "unknown_key"),
        ({"alg": "ES256", "kid": 7}, public, "malformed_token"),
        ({"alg": "ES256", "kid": "es256", "crit": ["x"]}, public, "malformed_token"),
        ({"alg": "ES256", "kid": "es256", "b64": False, "crit": ["b64"]}, public, "malformed_token"),
    ):
        with pytest.raises(Unauthorized) as refused:
            ours.verified(forged(header, claims, secret))
        assert refused.value.code == expected, header


@pytest.mark.parametrize("exp", [1e400, float("nan"), "x", [], {}, True, 10**30, 10**400, "99999999999", None])
def test_a_signed_token_of_odd_numbers_is_refused_or_has_expired(
    known: tuple[provider.Issuer, tokens.Tokens], exp: Any
) -> None:
    it, ours = known
    name, key = it.keys["es256"]
    claims = {"iss": provider.ISSUER, "aud": provider.AUDIENCE, "sub": "eve", "exp": exp}
    token = jwt.api_jws.encode(json.dumps(claims).encode(), key, name, headers={"kid": "es256"})
    if exp in (10**30, "99999999999"):
        assert ours.verified(token).caller.tenant == "eve"
        return
    with pytest.raises(Unauthorized):
        ours.verified(token)


def test_what_nests_deep_is_refused(known: tuple[provider.Issuer, tokens.Tokens]) -> None:
    it, ours = known
    name, key = it.keys["es256"]
    deep = b'{"a":' + b"[" * 6000 + b"]" * 6000 + b"}"
    for token in (
        jwt.api_jws.encode(deep, key, name, headers={"kid": "es256"}),
        base64.urlsafe_b64encode(deep).decode() + ".e30.e30",
    ):
        with pytest.raises(Unauthorized):
            ours.verified(token)


@given(
    token=st.text(max_size=60)
    | st.builds(
        forged,
        st.dictionaries(
            st.sampled_from(["alg", "kid", "typ", "crit", "b64"]), st.sampled_from(["ES256", "es256", 1, None])
        ),
        st.binary(max_size=30),
        st.binary(max_size=64),
    )
)
@settings(max_examples=150, deadline=None)
def test_no_text_passes_for_a_token(known: tuple[provider.Issuer, tokens.Tokens], token: str) -> None:
    with pytest.raises(Unauthorized):
        known[1].verified(token)
