"""What looks like a credential is never told, wherever people put one."""

from __future__ import annotations

import io
import logging
from urllib.parse import quote

import jwt
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_kserve.access import access_line, open_log
from aim_kserve.errors import NotFound, StartupError
from aim_kserve.identity.keys import new_key
from aim_kserve.log import OneLine
from aim_kserve.redacted import redacted
from aim_kserve.settings import ServerSettings, SettingsError

KEY = new_key("team-a", tenant="a")[0]
SECRET = KEY.rpartition("_")[2]
TOKEN = jwt.encode({"sub": "somebody"}, "k" * 32, algorithm="HS256")


@given(st.text(max_size=80), st.text(max_size=80), st.sampled_from([KEY, KEY.upper(), TOKEN, quote(KEY, safe="")]))
def test_no_secret_survives_whatever_stands_around_it(before: str, after: str, credential: str) -> None:
    for text in (before + credential + after, before + quote(KEY).replace("_", "%5F") + after):
        told = redacted(text)
        assert SECRET.lower() not in told.lower()
        assert TOKEN.rpartition(".")[2] not in told
        assert TOKEN.split(".")[1] not in told


def test_digests_and_ids_stay() -> None:
    for text in (f"sha256:{SECRET}", f"/v1/models/{SECRET[:40]}", f"trace {SECRET[:32]}", "a" * 500):
        assert redacted(text) == text


def test_the_access_log_errors_and_the_process_log() -> None:
    log = open_log([(b"x-request-id", KEY.encode()), (b"tracestate", b"v=1")])
    assert log.request_id == log.trace_id
    line = access_line(log, 0, path=f"/v1/models/{KEY}", method="GET")
    assert orjson.loads(line)["path"] == "/v1/models/aim_team-a_***"
    error = NotFound(f"model {TOKEN!r} does not exist", param=KEY)
    assert "eyJ***" in str(error)
    assert (error.param, SECRET in str(error.body())) == ("aim_team-a_***", False)
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(OneLine("%(message)s"))
    logger = logging.Logger("x")
    logger.addHandler(handler)
    try:
        raise KeyError(KEY)
    except KeyError:
        logger.exception("GET /%s failed", KEY)
    assert SECRET not in out.getvalue()
    assert out.getvalue().count("aim_team-a_***") >= 2


@pytest.mark.parametrize("arguments", [["--api_keys", "{}"], ["{}"], ["--{}", "1"], ["--http_port", "{}"]])
def test_a_process_that_does_not_start_tells_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [argument.replace("{}", KEY) for argument in arguments]
    with pytest.raises((SettingsError, SystemExit, StartupError)) as refused:
        raise StartupError(f"{ServerSettings.load(given, {}, prog='test', description='').api_keys} cannot be read")
    told = f"{refused.value} {capsys.readouterr().err}"
    assert "team-a" in told
    assert SECRET not in told


def test_nor_the_password_of_an_address() -> None:
    given = ["--jwt_issuer", "i", "--jwt_audience", "a", "--jwt_jwks", "https://user:passw0rd@issuer.example/jwks"]
    with pytest.raises(SettingsError, match=r"without a user.*://\*\*\*@issuer") as refused:
        ServerSettings.load(given, {}, prog="test", description="")
    assert "passw0rd" not in str(refused.value)
