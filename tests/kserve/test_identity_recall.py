"""A credential that was verified is remembered by its digest: for what it may, until it ends or keys have changed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from aim_kserve.access import open_log
from aim_kserve.errors import Forbidden, Unauthorized
from aim_kserve.identity import keys as key_file
from aim_kserve.identity import verify
from aim_kserve.identity.caller import Scope
from aim_kserve.settings import ServerSettings

INFER: frozenset[Scope] = frozenset({"infer"})
Headers = list[tuple[bytes, bytes]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture
def headers(file: Path) -> Headers:
    text, entry = key_file.new_key("ci", tenant="a")
    key_file.add(file, entry)
    return [(b"host", b"h"), (b"authorization", f"Bearer {text}".encode())]


@pytest.fixture
def verifier(file: Path, headers: Headers) -> verify.Verifier:
    verifier = verify.Verifier(ServerSettings.load(["--api_keys", str(file)], {}, prog="test", description=""))
    verifier.start()
    verifier.stop()  # a test looks when it wants to
    return verifier


async def test_only_what_was_verified_is_recalled(verifier: verify.Verifier, headers: Headers) -> None:
    assert verifier.recall(headers, INFER, open_log([])) is None
    caller = await verifier.admit(headers, INFER, open_log([]))
    log = open_log([])
    assert verifier.recall(headers, INFER, log) is caller
    assert log.fields == {"key": "ci", "tenant": "a"}
    assert verifier.recall([], INFER, open_log([])) is None
    assert verifier.recall([*headers, (b"x-api-key", b"aim_other_0f")], INFER, open_log([])) is None
    assert verifier.recall([(b"authorization", headers[1][1] + b"0")], INFER, open_log([])) is None
    assert headers[1][1] not in repr(vars(verifier)).encode()


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key", b"api-key"])
async def test_it_is_recalled_where_it_counts_only(verifier: verify.Verifier, headers: Headers, name: bytes) -> None:
    """``Bearer`` is not part of an ``x-api-key``, nor left out of an ``authorization``: asked twice, answered alike."""
    bearer = headers[1][1]
    given = bearer if name == b"authorization" else bearer.removeprefix(b"Bearer ")
    await verifier.admit([(name, given)], INFER, open_log([]))
    assert verifier.recall([(name, given)], INFER, open_log([]))
    for other in (b"authorization", b"x-api-key", b"api-key"):
        if (other == b"authorization") != (name == b"authorization"):
            assert verifier.recall([(other, given)], INFER, open_log([])) is None
            with pytest.raises(Unauthorized):
                await verifier.admit([(other, given)], INFER, open_log([]))


async def test_it_is_recalled_for_its_scopes_only(verifier: verify.Verifier, headers: Headers) -> None:
    await verifier.admit(headers, INFER, open_log([]))
    assert verifier.recall(headers, frozenset({"infer", "admin"}), open_log([])) is None
    with pytest.raises(Forbidden):
        await verifier.admit(headers, frozenset({"admin"}), open_log([]))


async def test_nothing_is_recalled_once_keys_have_changed(
    verifier: verify.Verifier, headers: Headers, file: Path
) -> None:
    await verifier.admit(headers, INFER, open_log([]))
    key_file.revoke(file, "ci")
    assert verifier._keys is not None
    verifier._keys.look()
    assert verifier.recall(headers, INFER, open_log([])) is None
    with pytest.raises(Unauthorized):
        await verifier.admit(headers, INFER, open_log([]))


async def test_what_was_verified_while_keys_changed_is_not_remembered(
    verifier: verify.Verifier, headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verifier._keys is not None
    verified = verifier._keys.verified

    def by_the_keys_before(text: str) -> object:
        found = verified(text)
        verifier._forget()
        return found

    monkeypatch.setattr(verifier._keys, "verified", by_the_keys_before)
    await verifier.admit(headers, INFER, open_log([]))
    assert verifier.recall(headers, INFER, open_log([])) is None


async def test_it_is_recalled_until_it_ends(
    verifier: verify.Verifier, headers: Headers, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = (
        key_file.read(file).keys[0].model_copy(update={"expires": key_file.datetime.fromtimestamp(2e9, key_file.UTC)})
    )
    key_file.write(file, key_file.KeyFile(keys=(entry,)))
    assert verifier._keys is not None
    verifier._keys.look()
    assert await verifier.admit(headers, INFER, open_log([]))
    assert verifier.recall(headers, INFER, open_log([]))
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert verifier.recall(headers, INFER, open_log([])) is None
    with pytest.raises(Unauthorized, match="expired on"):
        await verifier.admit(headers, INFER, open_log([]))


async def test_what_is_remembered_is_bounded(
    verifier: verify.Verifier, headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MAX_RECENT", 2)
    for spaces in range(1, 6):
        value = headers[1][1].replace(b" ", b" " * spaces)
        await verifier.admit([(b"authorization", value)], INFER, open_log([]))
    assert len(verifier._recent) <= 2
