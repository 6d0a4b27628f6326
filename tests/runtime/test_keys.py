"""``aim-runtime keys``: what is printed and kept, and that two at once lose nothing."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import orjson
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aim_kserve.errors import StartupError
from aim_kserve.identity import keys
from aim_runtime.keys import expiry, fresh_id, main, state

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
TEXT = re.compile(r"aim_[a-z0-9.-]+_[0-9a-f]{64}\n")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def new(file: Path, *flags: str) -> int:
    return main(["new", "--file", str(file), *flags])


def test_a_key_is_printed_once_and_kept_as_its_hash(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tenant", "Team A", "--class", "high", "--scopes", "infer,admin", "--models", "chat", "team-*"]
    assert new(file, *flags, "--expires", "90d", "--note", "for the console") == 1  # a tenant has no space
    assert "tenant" in capsys.readouterr().err
    assert not file.exists()
    flags[1] = "Team-A"
    assert new(file, *flags, "--expires", "90d", "--note", "for the console") == 0
    told = capsys.readouterr()
    assert TEXT.fullmatch(told.out)  # nothing but the key: it can be piped
    text = told.out.strip()
    assert text not in told.err
    secret = text.rpartition("_")[2]
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (entry,) = keys.read(file).keys
    assert entry.is_for(text)
    assert entry.id.startswith("team-a-")
    assert (entry.tenant, entry.qos_class, entry.scopes) == ("Team-A", "high", ("infer", "admin"))
    assert (entry.models, entry.note) == (("chat", "team-*"), "for the console")
    assert entry.expires is not None
    assert abs(entry.expires - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)


def test_by_default_a_key_may_ask_every_model_and_nothing_else(file: Path) -> None:
    assert new(file, "--tenant", "a") == 0
    (entry,) = keys.read(file).keys
    assert (entry.scopes, entry.models, entry.qos_class, entry.expires) == (("infer",), None, None, None)


def test_list_marks_what_ends_and_shows_no_hash_unasked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = datetime.now(UTC)
    for name, expires in {"old": now - timedelta(days=1), "near": now + timedelta(days=3), "long": None}.items():
        keys.add(file, keys.new_key(name, tenant="a", expires=expires)[1])
    keys.add(file, keys.new_key("later", tenant="a", not_before=now + timedelta(days=1))[1])
    assert main(["list", "--file", str(file)]) == 0
    table = capsys.readouterr().out
    states = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert "expired" in states["old"]
    assert "soon" in states["near"]
    assert "valid" in states["long"]
    assert "not yet" in states["later"]
    assert "sha256" not in table
    assert main(["list", "--file", str(file), "-o", "json"]) == 0
    rows = orjson.loads(capsys.readouterr().out)
    assert {row["id"]: row["state"] for row in rows} == {
        "old": "expired",
        "near": "soon",
        "long": "valid",
        "later": "not yet",
    }
    assert all("hash" not in row for row in rows)
    for how in ("text", "json"):
        assert main(["list", "--file", str(file), "-o", how, "--hashes"]) == 0
        assert capsys.readouterr().out.count("sha256:") == 4


def test_a_revoked_key_is_gone_and_the_others_stay(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        assert new(file, "--tenant", "t", "--id", name) == 0
    before = {key.id: key for key in keys.read(file).keys}
    capsys.readouterr()
    assert main(["revoke", "--file", str(file), "b"]) == 0
    told = capsys.readouterr()
    assert (told.out, "b (tenant t)" in told.err) == ("", True)
    assert {key.id: key for key in keys.read(file).keys} == {name: before[name] for name in ("a", "c")}
    assert main(["revoke", "--file", str(file), "b"]) == 1
    assert capsys.readouterr().err == f"error: {file}: no key has the id 'b'; there are: a, c\n"


@pytest.mark.parametrize(
    ("flags", "code", "complaint"),
    [
        (["--tenant", "a", "--class", "urgent"], 2, "invalid choice: 'urgent'"),
        (["--tenant", "a", "--scopes", "infer,root"], 2, "'root' is no scope"),
        (["--tenant", "a", "--scopes", ""], 2, "'' is no scope"),
        (["--tenant", "a", "--expires", "soon"], 2, "'soon' is no time"),
        (["--tenant", "a", "--expires", "2027-01-31T00:00:00"], 2, "has no zone"),
        (["--tenant", "a", "--expires", "2020-01-31T00:00:00Z"], 2, "is past"),
        (["--tenant", "a", "--expires", "999999w"], 2, "is no time"),
        ([], 2, "--tenant"),
        (["--tenant", "a", "--id", "Big"], 1, "id"),
        (["--tenant", "a", "--id", "jwt"], 1, "means something else"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_and_nothing_written(
    file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, complaint: str
) -> None:
    try:
        got = new(file, *flags)
    except SystemExit as ended:
        got = int(ended.code or 0)
    told = capsys.readouterr()
    assert (got, told.out) == (code, "")
    assert complaint in told.err
    assert "Traceback" not in told.err
    assert not file.exists()


@pytest.mark.parametrize("verb", [["new", "--tenant", "a"], ["list"], ["revoke", "a"]])
def test_a_file_that_is_none_is_left_as_it_is(file: Path, capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    file.write_text("version: 1\nkeys:\n- {id: a, hush: 1}\n")
    assert main([*verb, "--file", str(file)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: {file}:")
    assert file.read_text() == "version: 1\nkeys:\n- {id: a, hush: 1}\n"


def test_two_at_once_lose_nothing(file: Path) -> None:
    """Whoever comes while another writes is told so: what was printed is in the file, and nothing else is."""
    command = [sys.executable, "-m", "aim_runtime", "keys", "new", "--file", str(file), "--tenant", "t"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [(process.communicate(timeout=60), process.returncode) for process in running]
    printed = [out.strip() for (out, _), code in ended if code == 0]
    for (out, err), code in ended:
        assert code == 0 or (code == 1 and out == "" and "another process is changing it" in err)
    held = keys.read(file).keys
    assert len(held) == len(printed) >= 1
    assert all(any(key.is_for(text) for key in held) for text in printed)


def test_a_reader_that_leaves_ends_it_like_any_filter(file: Path) -> None:
    command = [sys.executable, "-m", "aim_runtime", "keys", "list", "--file", str(file)]
    keys.write(file, keys.KeyFile(keys=(keys.new_key("a", tenant="t")[1],)))
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert process.stderr == b""
    assert process.returncode != 0


@given(st.integers(1, 9999), st.sampled_from("mhdw"))
def test_a_span_is_counted_from_now(count: int, unit: str) -> None:
    seconds = {"m": 60, "h": 3600, "d": 86400, "w": 604800}[unit]
    assert (expiry(f"{count}{unit}", NOW) - NOW).total_seconds() == count * seconds


@given(st.timedeltas(timedelta(days=2), timedelta(days=9999)), st.integers(-12, 12))
def test_a_written_time_means_itself(span: timedelta, hours: int) -> None:
    written = (NOW + span).replace(microsecond=0).astimezone(timezone(timedelta(hours=hours))).isoformat()
    assert expiry(written, NOW) == datetime.fromisoformat(written)


@given(st.text(max_size=20))
def test_no_text_gives_a_key_that_has_ended(text: str) -> None:
    try:
        when = expiry(text, NOW)
    except ValueError:
        return
    assert when > NOW


@given(st.text(min_size=1, max_size=200))
def test_a_fresh_id_is_one_that_a_file_takes(tenant: str) -> None:
    text, entry = keys.new_key(fresh_id(tenant), tenant="t")
    assert keys.id_of(text) == entry.id
    assert state(entry, NOW) == "valid"


def test_what_is_written_is_yaml_that_people_read(file: Path) -> None:
    assert new(file, "--tenant", "a", "--id", "a-1", "--expires", "2099-01-31T00:00:00+02:00") == 0
    (row,) = yaml.safe_load(file.read_text())["keys"]
    assert row["id"] == "a-1"
    assert keys.read(file).keys[0].expires == datetime(2099, 1, 30, 22, tzinfo=UTC)


def test_a_key_given_for_another_value_is_not_repeated(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(file, "--id", "ci", "--tenant", "t") == 0
    text = capsys.readouterr().out.strip()
    for flags in (
        ["revoke", "--file", str(file), text],
        ["revoke", "--file", text, "ci"],
        ["list", "--file", text],
        ["new", "--file", str(file), "--tenant", text],
        ["new", "--file", str(file), "--tenant", "t", "--id", text],
        ["new", "--file", str(file), "--tenant", "t", "--scopes", text],
        ["new", "--file", str(file), "--tenant", "t", "--expires", text],
        ["list", "--file", str(file), text],
    ):
        try:
            assert main(flags) == 1
        except SystemExit as ended:
            assert ended.code == 2  # noqa: PT017
        told = capsys.readouterr()
        assert "aim_ci_***" in told.err
        assert text.rpartition("_")[2] not in told.err + told.out
    assert not [path for path in (*file.parent.iterdir(), *Path().iterdir()) if text in path.name]


def test_a_note_commands_no_terminal(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(file, "--id", "ci", "--tenant", "t", "--note", "\x1b[31mred\nci2  t2") == 0
    capsys.readouterr()
    assert main(["list", "--file", str(file)]) == 0
    (_, line) = capsys.readouterr().out.splitlines()
    assert line.rstrip().endswith("\\x1b[31mred\\nci2  t2")


def test_times_are_told_in_utc(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(file, "--id", "ci", "--tenant", "t") == 0
    text = capsys.readouterr().out.strip()
    with file.open("a") as more:
        more.write("  expires: 2026-01-01T01:00:00+02:00\n")
    assert main(["list", "--file", str(file)]) == 0
    assert "2025-12-31T23:00:00Z" in capsys.readouterr().out
    with pytest.raises(StartupError, match="2025-12-31T23:00:00Z"):
        keys.check_usable(file, keys.read(file))
    assert keys.read(file).keys[0].is_for(text)
