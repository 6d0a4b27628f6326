"""Directories, S3 and HTTP: the same behind one door, and nobody leaves by it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from aim_trainer.errors import StoreError
from aim_trainer.places.directory import SMALL_BYTES
from aim_trainer.places.open import open_file, open_place
from aim_trainer.places.place import Entry, Place
from ports import free_ports
from rclone_servers import S3_ENVIRONMENT, http_server


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "directory":
        return open_place(str(tmp_path / "place"))
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{request.getfixturevalue('s3_port')}")
    return open_place(f"s3://bucket/{tmp_path.name}", patience_s=20)


def test_a_tree_of_files_goes_there_and_comes_back(place: Place, tmp_path: Path) -> None:
    assert place.files() == ()
    assert place.folders() == ()
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20))
    place.write("a/b/weights.bin", file)
    place.write_bytes("a/about.json", b"{}")
    place.write_bytes("top", b"")
    assert place.files() == (Entry("a/about.json", 2), Entry("a/b/weights.bin", 1 << 20), Entry("top", 0))
    assert place.folders() == ("a",)
    assert place.at("a").files() == (Entry("about.json", 2), Entry("b/weights.bin", 1 << 20))
    assert place.read("a/b/weights.bin", tmp_path / "new/back").read_bytes() == file.read_bytes()
    assert place.read_bytes("a/about.json") == b"{}"
    assert (place.exists("top"), place.exists("a"), place.exists("no")) == (True, False, False)
    place.write_bytes("a/about.json", b"{1}")
    assert place.read_bytes("a/about.json") == b"{1}"
    place.remove("a")
    place.remove("a")
    assert place.files() == (Entry("top", 0),)
    place.remove()
    assert place.files() == ()


def test_what_is_not_there_is_named(place: Place, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no/such: no such .*file; check"):
        place.read_bytes("no/such")
    with pytest.raises(StoreError, match=r"no/such: no such .*file; check"):
        place.read("no/such", tmp_path / "into")
    assert list(tmp_path.glob("*unfinished*")) == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a\\b", "a\0b", "n" * 300])
def test_a_name_never_leaves(place: Place, name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is refused"):
        place.write_bytes(name, b"x")
    with pytest.raises(StoreError, match="is refused"):
        place.read(name, tmp_path / "into")
    with pytest.raises(StoreError, match="is refused"):
        place.at(name)


def test_readers_never_see_a_part(place: Place, tmp_path: Path) -> None:
    old, new = b"o" * 100_000, b"n" * 100_000
    place.write_bytes("file", old)
    done = threading.Event()

    def swap() -> None:
        for number in range(6):
            place.write_bytes("file", new if number % 2 else old)
        done.set()

    writer = threading.Thread(target=swap)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(place.read_bytes("file"))
    writer.join()
    assert seen <= {old, new}


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = open_place(str(tmp_path))
    place.write_bytes("file", b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match="file: no space left; free some, or name another place"):
        place.write("file", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert place.read_bytes("file") == b"old"


def test_a_place_that_is_away_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(StoreError, match=r"s3://bucket/x: cannot be reached .*, tried for 1 s; check the endpoint"):
        open_place("s3://bucket/x", patience_s=1).files()


def test_wrong_keys_are_said_at_once(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    with pytest.raises(StoreError, match="s3://bucket/x/y: refused; check AWS_ACCESS_KEY_ID"):
        open_place("s3://bucket/x").write_bytes("y", b"")


def test_files_of_a_web_server_are_read(tmp_path: Path) -> None:
    (tmp_path / "www/data").mkdir(parents=True)
    (tmp_path / "www/data/chat.jsonl").write_bytes(b"{}\n")
    with http_server(tmp_path / "www") as port:
        place, name = open_file(f"http://127.0.0.1:{port}/data/chat.jsonl?signature=s", patience_s=5)
        assert (place.uri, name) == (f"http://127.0.0.1:{port}/data", "chat.jsonl")
        assert place.exists(name)
        assert place.read(name, tmp_path / "chat.jsonl").read_bytes() == b"{}\n"
        with pytest.raises(StoreError, match="no such"):
            place.read("none", tmp_path / "none")
        with pytest.raises(StoreError, match="nothing is written over HTTP"):
            place.write_bytes("x", b"")
        with pytest.raises(StoreError, match="nothing is listed over HTTP"):
            place.files()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "empty"),
        ("a\0b", "control characters"),
        ("file:///a%00b", "control characters"),
        ("ftp://host/x", "ftp:// is not read or written here"),
        ("s3://", "s3://BUCKET/PREFIX"),
        ("s3://bucket/../other", "s3://BUCKET/PREFIX"),
        ("file://host/x", "no host"),
        ("https://user:secret@host/x", "without a password"),
    ],
)
def test_a_uri_that_is_none_is_refused(uri: str, says: str) -> None:
    with pytest.raises(StoreError, match=says) as refused:
        open_place(uri)
    assert "secret" not in str(refused.value)


def test_what_is_read_as_a_whole_is_a_file_and_not_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as large:
        large.truncate(SMALL_BYTES + 1)
    place = open_place(str(tmp_path))
    for name, says in (("pipe", "no regular file"), ("device", "no regular file"), ("large", "larger than 64 MiB")):
        with pytest.raises(StoreError, match=says):
            place.read_bytes(name)
    for uri in ("a\0b", "file:///a%0Ab"):
        with pytest.raises(StoreError, match="control characters"):
            open_file(uri)


def test_a_file_is_told_from_its_place(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a.jsonl"), f"file://{tmp_path}/a.jsonl"):
        place, name = open_file(uri)
        assert (place.uri, name) == (str(tmp_path), "a.jsonl")
    with pytest.raises(StoreError, match="no file is named"):
        open_file("s3://bucket")
