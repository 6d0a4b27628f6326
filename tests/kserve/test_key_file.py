"""The key file: what is written is read again; what is wrong is said in a line; of a key only its hash is kept."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aim_kserve.errors import StartupError
from aim_kserve.identity import keys as key_file

HASH = f"sha256:{'0' * 64}"
ENTRY = f"- {{id: ci, hash: '{HASH}', tenant: t, scopes: [infer]"


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    text, entry = key_file.new_key("ci", tenant="a", scopes=("infer", "admin"), qos_class="high", models=["m*"])
    key_file.add(file, entry)
    assert text.startswith("aim_ci_")
    secret = text.removeprefix("aim_ci_")
    assert len(bytes.fromhex(secret)) == 32
    assert secret not in file.read_text()
    assert key_file.read(file).keys == (entry,)
    assert entry.is_for(text)
    assert not entry.is_for(text[:-1])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    file, now = tmp_path / name, datetime.now(UTC)
    for key_id in ("one", "two"):
        _, entry = key_file.new_key(
            key_id, tenant="t", not_before=now, expires=now + timedelta(days=1), note="of: the #1 - 'job'\n"
        )
        key_file.add(file, entry)
    assert [key.id for key in key_file.read(file).keys] == ["one", "two"]
    assert key_file.revoke(file, "one").id == "one"
    assert key_file.read(file).keys == (entry,)


def test_a_taken_and_an_unknown_id_are_refused_and_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    _, entry = key_file.new_key("ci", tenant="t")
    key_file.add(file, entry)
    before = file.read_bytes()
    with pytest.raises(StartupError, match="'ci' is taken"):
        key_file.add(file, entry)
    with pytest.raises(StartupError, match="no key has the id 'other'; there are: ci"):
        key_file.revoke(file, "other")
    assert file.read_bytes() == before


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    _, entry = key_file.new_key("ci", tenant="t")
    other = os.open(tmp_path / ".keys.yaml.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(StartupError, match="another process is changing it"):
            key_file.add(file, entry)
        assert not file.exists()
    finally:
        os.close(other)
    key_file.add(file, entry)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "gone" / "keys.yaml"
    with pytest.raises(StartupError, match="give a path in a writable folder"):
        key_file.write(file, key_file.KeyFile())
    link = tmp_path / "keys.yaml"
    link.symlink_to(tmp_path / "real.yaml")
    key_file.write(link, key_file.KeyFile())
    assert link.is_symlink()
    assert key_file.read(link).keys == ()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version: 2\nkeys: []", r":1: version: .*got 2.*version: 1 is known"),
        ("version: 1\nkeys:\n- id: X\n", r":3: keys\[0\] \('X'\): id: .*a to z"),
        (f"version: 1\nkeys:\n{ENTRY}, clas: high}}", r":3: keys\[0\] \('ci'\): clas: unknown field; known: id, hash"),
        (f"version: 1\nkeys:\n{ENTRY}, class: gold}}", r":3: keys\[0\] \('ci'\): class: .*high.*got 'gold'"),
        (f"version: 1\nkeys:\n{ENTRY}, expires: 2027-01-01}}", r":3: .*expires: .*with its zone"),
        (f"version: 1\nkeys:\n{ENTRY}}}\n{ENTRY}}}", r":2: keys: id 'ci' is there twice"),
        (f"version: 1\nkeys:\n{ENTRY.replace('ci', 'jwt')}}}", r"'jwt' means something else in metrics"),
        (f"version: 1\nkeys:\n{ENTRY.replace('infer', 'infr')}}}", r"scopes.*got 'infr'"),
        (f"version: 1\nkeys:\n{ENTRY.replace('[infer]', '[]')}}}", r"scopes: "),
        ("version: 1\nversion: 1", r":2: .*'version' is given twice"),
        ("{}", r":1: version: missing"),
        ("version: 1", r":1: keys: missing"),
        ("a: [", r":2: not valid YAML"),
        ("[]", r":1: a key file is a mapping"),
        ("", r":1: a key file is a mapping"),
        ("version: &a 1\nkeys: *a", r":2: not valid YAML \(an alias"),
        ("[" * 100_000, r":1: not valid YAML \(more than 6 levels"),
        ("version: 2027-13-45", r":1: not valid YAML \(no timestamp"),
        (f"version: 1\nkeys:\n{ENTRY}, note: !!timestamp soon}}", r":3: not valid YAML \(no timestamp"),
        (f"version: 1\nkeys:\n{ENTRY}, note: !!int ''}}", r":3: not valid YAML \(no int"),
        (f"version: 1\nkeys:\n{ENTRY}, note: !!bool maybe}}", r":3: not valid YAML \(no bool"),
        (f"version: 1\nkeys:\n{ENTRY}, ? [a] : b}}", r":3: not valid YAML \(the name of a field"),
        (f"version: 1\nkeys:\n{ENTRY}, not_before: 20270131}}", r":3: .*not_before: .*got 20270131.*with its zone"),
        (f"version: 1\nkeys:\n{ENTRY}, not_before: '20270131'}}", r":3: .*not_before: .*got '20270131'"),
        (f"version: 1\nkeys:\n{ENTRY}, expires: '0001-01-01T00:00:00+14:00'}}", r":3: .*expires: .*year"),
        (f"version: 1\nkeys:\n{ENTRY}, expires: 9999-12-31T23:59:59-10:00}}", r":3: .*expires: .*year"),
        (
            f"version: 1\nkeys:\n{ENTRY}, not_before: 2027-01-01T00:00:00Z, expires: 2026-01-01T00:00:00Z}}",
            r":3: keys\[0\] \('ci'\): expires is not after not_before",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(StartupError, match=told) as refused:
        key_file.read(file)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(file))


PLACES = [
    ("id", "{}"),
    ("hash", "{}"),
    ("tenant", "{}"),
    ("tenant", "'a {}'"),
    ("class", "{}"),
    ("scopes", "[{}]"),
    ("models", "['a {}']"),
    ("expires", "{}"),
    ("note", "!!int {}"),
    ("note", "[{}, {}]"),
    ("{}", "1"),
    ("'{}{}'", "1"),
    ("{}", "1\n  {}: 1"),
    ("note", "'{}"),
]


@pytest.mark.parametrize(("field", "value"), PLACES)
@pytest.mark.parametrize("key_id", ["ci", "a" * 40])
def test_a_key_in_the_wrong_place_is_not_repeated(tmp_path: Path, field: str, value: str, key_id: str) -> None:
    """Not even a part of it: what is told is cut after it has been looked through."""
    file = tmp_path / "keys.yaml"
    text, _ = key_file.new_key(key_id, tenant="t")
    fields = {"id": "ci", "hash": HASH, "tenant": "t", "scopes": "[infer]"} | {field: value}
    lines = "\n  ".join(f"{name}: {said}" for name, said in fields.items())
    file.write_text(f"version: 1\nkeys:\n- {lines}\n".replace("{}", text))
    with pytest.raises(StartupError) as refused:
        key_file.read(file)
    secret = text.rpartition("_")[2]
    assert not [at for at in range(57) if secret[at : at + 8] in str(refused.value)]


@pytest.mark.parametrize("field", ["tenant", "models"])
def test_a_key_is_no_name(field: str) -> None:
    """A tenant stands in every line of the access log."""
    text, _ = key_file.new_key("ci", tenant="t")
    names = {"tenant": text} if field == "tenant" else {"tenant": "t", "models": [text]}
    with pytest.raises(StartupError, match=f"{field}: .*a key or token"):
        key_file.new_key("ci", **names)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    with pytest.raises(StartupError, match="give a readable key file"):
        key_file.read(path)


@pytest.mark.parametrize("wrong", [b"\xff\xfe", b"#" * (key_file.MAX_FILE_BYTES + 1)], ids=["not UTF-8", "too large"])
def test_what_is_no_text_of_that_size_is_refused(tmp_path: Path, wrong: bytes) -> None:
    file = tmp_path / "keys.yaml"
    file.write_bytes(wrong)
    with pytest.raises(StartupError, match=r"not UTF-8|larger than"):
        key_file.read(file)
    with pytest.raises(StartupError, match="give a readable key file"):
        key_file.read(tmp_path)


@given(text=st.text(max_size=200) | st.text("{}[]:-,&*!|>'\"\n ab#?%@", max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_ends_in_anything_but_a_refusal(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(StartupError):
        key_file.read(file)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("aim_ci_0f", "ci"),
        ("aim_ci-2.x_0f_1", "ci-2.x"),
        ("aim_ci_", None),
        ("aim_ci", None),
        ("ci_0f", None),
        ("sk-aim_ci_0f", None),
        ("", None),
    ],
)
def test_the_id_is_in_the_key(text: str, found: str | None) -> None:
    assert key_file.id_of(text) == found
