"""The cache on a bad day: an index that somebody broke, two verbs at once, sources that lie, volumes that refuse."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from aim_runtime.cache.add import Options, add, present
from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.fetch import Effort
from aim_runtime.cache.index import Cache, Entry
from aim_runtime.cache.locks import Lease
from aim_runtime.cache.prune import prune, size_bytes
from aim_runtime.cache.selection import select
from aim_runtime.cache.source import RemoteFile
from aim_runtime.cache.uri import parse_uri
from aim_runtime.cache.use import cached, hold
from aim_runtime.cache.verbs import main
from aim_runtime.cache.verify import verify
from model_sources import cache_command, digests, random_model
from odd_http import Odd, odd_http

OPTIONS = Options(effort=Effort(2, 2), stall_s=5)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def have(cache: Cache, name: str) -> Entry:
    source = cache.root.parent / "sources" / name
    if not source.exists():
        random_model(source, 1000)
    return add(cache, parse_uri(str(source)), Options(name=name)).entry


def index_file(cache: Cache, entry: Entry) -> Path:
    return cache.own / "entries" / f"{entry.key}.json"


def spoil(cache: Cache, entry: Entry) -> None:
    file = cache.content(entry.key) / "config.json"
    file.write_text("[" * file.stat().st_size)


BROKEN = {
    "no JSON": lambda text: "{bad",
    "empty": lambda text: "",
    "newer": lambda text: json.dumps({**json.loads(text), "version": 2, "layers": []}),
    "key": lambda text: json.dumps({**json.loads(text), "key": "../../../outside"}),
    "name": lambda text: json.dumps({**json.loads(text), "name": "../outside"}),
    "path": lambda text: text.replace("config.json", "../../../outside/precious"),
    "size": lambda text: re.sub(r'"size": *[0-9]+', '"size": -1', text),
    "time": lambda text: re.sub(r'"fetched_at": *[0-9.]+', '"fetched_at": 1e300', text),
}


@pytest.mark.parametrize("how", BROKEN)
def test_one_broken_entry_is_named_and_spared_and_takes_no_other_model_along(
    cache: Cache, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = have(cache, "good"), have(cache, "bad")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").write_text("x")
    file = index_file(cache, bad)
    file.write_text(BROKEN[how](file.read_text()))
    before = file.read_text()
    assert cached(cache.root, good.source) == cache.content(good.key)
    assert hold(cache.link("good")) is not None
    where = ["--cache", str(cache.root)]
    for verb, code in (["list"], 0), (["stats"], 0), (["prune", "--max-size", "1B"], 1), (["verify"], 1):
        assert main([*verb, *where]) == code
        said = capsys.readouterr().err
        assert said.count(f"{file}: ") == 1
        assert ("newer" in said) == (how == "newer")
        assert "Traceback" not in said
    assert (tmp_path / "outside/precious").exists()
    assert file.read_text() == before  # it may be a newer version's
    assert cache.content(bad.key).is_dir()
    with pytest.raises(CacheError, match="cannot be read"):
        cached(cache.root, bad.source)
    if how != "newer":
        assert add(cache, parse_uri(bad.source), Options(name="bad")).entry.key == bad.key
        assert cached(cache.root, bad.source) == cache.content(bad.key)


def test_an_entry_that_is_mended_is_never_taken_for_whole_before_it_is(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each step of an add that mends a damaged entry of the same key."""
    steps = [0]

    class Killed(BaseException):
        pass

    def guarded(real: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **options: object) -> object:
            steps[0] -= 1
            if steps[0] == 0:
                raise Killed
            return real(*args, **options)

        return step

    entry = have(cache, "m")
    expected = digests(cache.content(entry.key))
    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "symlink_to"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    for number in range(1, 200) if "SOAK_KILLS" in os.environ else range(random.randrange(1, 4), 200, 3):
        spoil(cache, entry)
        verify(cache, cache.entries(), quick=False)
        assert cache.find("m") is None
        steps[0] = number
        try:
            have(cache, "m")
        except Killed:
            ended = True
        else:
            ended = False
        steps[0] = 0
        found = cache.find("m")
        assert found is None or digests(cache.content(found.key)) == expected
        have(cache, "m")
        assert digests(cache.link("m").resolve()) == expected
        if not ended:
            break
    assert number > 10


def test_a_source_that_names_no_version_fetched_again_does_not_take_a_served_model_away(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = have(cache, "m")
    before = os.stat(cache.content(entry.key) / "config.json").st_ino
    monkeypatch.setattr(RemoteFile, "resumable", property(lambda file: False))
    again = add(cache, parse_uri(entry.source), Options(name="m"))
    assert again.fetched_bytes == entry.size_bytes
    assert os.stat(cache.content(entry.key) / "config.json").st_ino == before
    assert cache.find("m") == again.entry
    assert not list((cache.own / "partial").iterdir())


def test_what_verify_saw_is_not_written_over_what_others_did_meanwhile(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = have(cache, "m")
    spoil(cache, entry)
    seen = cache.entries()
    prune(cache, max_size_bytes=0, max_age_s=None)
    assert verify(cache, seen, quick=False) == []  # gone, and not written back
    assert cache.entries() == []
    entry = have(cache, "m")
    spoil(cache, entry)

    def pinned_meanwhile(self: Lease, release: Callable[[Lease], None] = Lease.release) -> None:
        release(self)
        cache.write(cache.entries()[0].model_copy(update={"pinned": True}))

    monkeypatch.setattr(Lease, "release", pinned_meanwhile)
    assert verify(cache, cache.entries(), quick=False)[0].bad
    assert (cache.entries()[0].state, cache.entries()[0].pinned) == ("damaged", True)

    def mended_meanwhile(self: Lease, release: Callable[[Lease], None] = Lease.release) -> None:
        have(cache, "m")

    monkeypatch.setattr(Lease, "release", mended_meanwhile)
    verify(cache, cache.entries(), quick=False)
    assert cache.find("m") is not None


def test_a_lost_lease_is_no_reason_to_skip_a_model(cache: Cache) -> None:
    entry = have(cache, "m")
    shutil.rmtree(cache.own / "leases")
    spoil(cache, entry)
    assert list(verify(cache, cache.entries(), quick=False)[0].bad) == ["config.json"]
    entry = have(cache, "m")
    shutil.rmtree(cache.own / "leases")
    assert hold(cache.link("m")) is not None


def test_a_lease_of_what_was_pruned_and_fetched_anew_holds_nothing(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = have(cache, "m")

    def opens(path: object, *rest: int, real: Callable[..., int] = os.open) -> int:
        monkeypatch.undo()
        descriptor = real(path, *rest)
        cache.lease(entry.key).unlink()
        cache.lease(entry.key).touch()
        return descriptor

    monkeypatch.setattr("aim_runtime.cache.locks.os.open", opens)
    with pytest.raises(CacheError, match="was removed just now: ask again"):
        Lease(cache.lease(entry.key))
    Lease(cache.lease(entry.key)).release()


def test_sizes_are_told_while_files_come_and_go(cache: Cache) -> None:
    have(cache, "m")
    busy, ended = cache.own / "partial/n/state", threading.Event()
    busy.mkdir(parents=True)

    def changing() -> None:
        while not ended.is_set():
            for number in range(20):
                (busy / f"{number}").write_text("x")
                (busy / f"{number}.d").mkdir()
            for number in range(20):
                (busy / f"{number}").unlink()
                (busy / f"{number}.d").rmdir()

    changes = threading.Thread(target=changing)
    changes.start()
    try:
        for _ in range(100):
            assert size_bytes(cache) > 0
            prune(cache, max_size_bytes=None, max_age_s=3600)
    finally:
        ended.set()
        changes.join()


def test_prune_leaves_no_lock_behind_for_what_it_sweeps(cache: Cache) -> None:
    have(cache, "m")
    (cache.own / "trash/0123").mkdir(parents=True)
    (cache.root / "org").mkdir()
    for killed in (cache.own / "entries", cache.root / "org", cache.root):
        (killed / f".{'a' * 32}.tmp").symlink_to("nowhere")
        os.utime(killed / f".{'a' * 32}.tmp", (0, 0), follow_symlinks=False)
    prune(cache, max_size_bytes=None, max_age_s=None)
    assert not (cache.own / "locks/0123").exists()
    assert not list(cache.root.rglob("*.tmp"))


def test_prefetch_of_what_is_here_needs_no_lock(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a volume that is mounted to be read only."""
    entry = have(cache, "m")

    def refused(*_: object) -> None:
        raise CacheError("read only")

    monkeypatch.setattr("aim_runtime.cache.add.exclusive", refused)
    found = present(cache, parse_uri(entry.source), Options())
    assert found is not None
    assert found.hit
    with pytest.raises(CacheError, match="read only"):
        present(cache, parse_uri(entry.source), Options(pin=True))


def test_prefetch_does_not_bring_back_what_is_pruned_while_it_waits(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = have(cache, "m")
    from aim_runtime.cache.locks import exclusive

    def pruned_first(path: Path, *rest: object) -> object:
        prune(cache, max_size_bytes=0, max_age_s=None)
        return exclusive(path, 5)

    monkeypatch.setattr("aim_runtime.cache.add.exclusive", pruned_first)
    assert present(cache, parse_uri(entry.source), Options(pin=True)) is None
    assert cache.entries() == []
    assert not cache.link("m").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="root is who can become somebody else")
def test_an_index_that_may_not_be_read_is_not_an_empty_one(cache: Cache, tmp_path: Path) -> None:
    entry = have(cache, "m")
    (cache.own / "entries").chmod(0o700)
    for folder in (cache.own, cache.root, *tmp_path.parents, tmp_path):
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    before = os.geteuid()
    os.seteuid(65534)
    try:
        with pytest.raises((CacheError, OSError), match="Permission denied"):
            cached(cache.root, entry.source)
    finally:
        os.seteuid(before)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["list", "--cache", ""], 2, "--cache: '': give the directory of the cache"),
        (["prune", "--max-s", "1B", "--cache", "CACHE"], 2, "unrecognized arguments: --max-s"),
        (["list", "--cache", "FILE"], 1, "FILE: is no directory: give --cache the directory of the cache"),
        (["list", "--cache", "/nowhere/cache"], 1, "/nowhere/cache: no such directory: give --cache"),
        (["stats", "--cache", "/nowhere/cache"], 1, "/nowhere/cache: no such directory: give --cache"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "CACHE").mkdir()
    try:
        done = main([str(tmp_path / each) if each in ("FILE", "CACHE") else each for each in arguments])
    except SystemExit as ended:
        done = ended.code
    err = capsys.readouterr().err
    assert done == code
    assert said in err.replace(f"{tmp_path}/", "")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "given",
    [
        "https://user:s3cret@host/m\n",
        "https://user:s3@cret@host/m",
        "ftp://user:s3cret@host/m",
        "hf://user:s3cret@org/m",
        "oci://user:s3cret@host/m",
        "https://user:s3cret@host/m\udc80",
        "https://host/m\n?sig=s3cret",
    ],
)
def test_a_refused_source_is_not_told_with_its_secret(given: str) -> None:
    with pytest.raises(CacheError) as refused:
        parse_uri(given)
    assert "cret" not in str(refused.value)


# What a source lists


def test_ten_thousand_files_are_chosen_from_in_linear_time() -> None:
    """Counted by comparisons, not by a clock."""
    compared = [0]

    class Counted(RemoteFile):
        def __eq__(self, other: object) -> bool:
            compared[0] += 1
            return self is other

        __hash__ = None  # type: ignore[assignment]

    files = [Counted(f"model-{number:05}-of-05000.safetensors", 1, "") for number in range(4_000)]
    files += [Counted(f"{number}.json", 1, "") for number in range(4_000)]
    assert len(select(files, (), (), "x")) == 8_000
    assert compared[0] <= 8_000
    deep = [RemoteFile(f"a/b/c/d/{number}.gguf", 1, "") for number in range(10_000)]
    assert len(select(deep, ("*",), (), "x")) == 10_000


@pytest.mark.parametrize(
    "twins",
    [
        ("config.json", "Config.json"),
        ("caf\u00e9.json", "cafe\u0301.json"),
        ("A/config.json", "a/other.json"),
        ("stra\u00dfe.json", "STRASSE.json"),
    ],
)
def test_names_that_some_volumes_take_for_one_are_refused(twins: tuple[str, str]) -> None:
    """On SMB, on a folder of ext4 with casefold, or on a Mac the second would be written over the first."""
    files = [RemoteFile(name, 1, "") for name in twins]
    with pytest.raises(CacheError, match=r"differ only in case or Unicode.*: leave one out with --exclude"):
        select(files, ("*",), (), "x")
    assert select(files, ("*",), (twins[1],), "x")


def test_a_directory_with_what_no_model_is_made_of(cache: Cache, tmp_path: Path) -> None:
    source = tmp_path / "m"
    (source / ".cache/huggingface").mkdir(parents=True)
    (source / ".cache/huggingface/download.json").write_text("{}")
    (source / "deep").mkdir()
    (source / "deep/model.safetensors").write_bytes(b"w")
    (source / "deep/again").symlink_to("..", target_is_directory=True)
    (source / "itself").symlink_to("itself")
    (source / "nowhere.json").symlink_to("/nowhere")
    (source / "empty.json").touch()
    os.mkfifo(source / "pipe.json")
    assert sorted(digests(cache.content(add(cache, parse_uri(str(source)), OPTIONS).entry.key))) == [
        "deep/model.safetensors",
        "empty.json",
    ]


def test_a_cache_inside_its_source_is_not_fetched_into_itself(tmp_path: Path) -> None:
    source = tmp_path / "m"
    random_model(source, 1000)
    (source / "config.json").rename(source / "other.dat")
    cache = Cache(source / "cache")
    first = add(cache, parse_uri(str(source)), replace(OPTIONS, include=("*",)))
    second = add(cache, parse_uri(str(source)), replace(OPTIONS, include=("*",)))
    assert second.hit
    assert len(first.entry.files) == 2


def test_a_directory_that_loses_a_file_while_it_is_listed_is_listed_again(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(tmp_path / "m", 1000)
    (tmp_path / "m/tmp.json").touch()
    from aim_runtime.cache.sources import disk

    real = disk._validator

    def leaves(path: Path) -> str:
        (tmp_path / "m/tmp.json").unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(disk, "_validator", leaves)
    assert len(add(cache, parse_uri(str(tmp_path / "m")), OPTIONS).entry.files) == 2


@pytest.mark.parametrize("first", ["file", "directory"])
def test_a_file_that_became_a_directory_between_two_attempts(cache: Cache, tmp_path: Path, first: str) -> None:
    """And the other way round: what an earlier attempt left stands in nobody's way."""
    source, left = tmp_path / "m", cache.partial("m") / "files"
    (source / "a").mkdir(parents=True) if first == "file" else source.mkdir()
    (source / "a/b.json" if first == "file" else source / "a").write_text("{}")
    left.mkdir(parents=True)
    (left / "a").touch() if first == "file" else (left / "a/b").mkdir(parents=True)
    if first == "directory":
        (left / "a/b/c.json").touch()
    entry = add(cache, parse_uri(str(source)), replace(OPTIONS, include=("*",))).entry
    assert [file.path for file in entry.files] == ["a/b.json" if first == "file" else "a"]


def test_a_file_where_a_name_needs_a_directory_is_told_before_anything_is_fetched(cache: Cache, tmp_path: Path) -> None:
    random_model(tmp_path / "m", 10)
    cache.root.mkdir()
    (cache.root / "org").write_text("mine")
    with pytest.raises(CacheError, match="org: is here already and not this cache's: move it away, or give --name"):
        add(cache, parse_uri(str(tmp_path / "m")), Options(name="org/m"))
    assert (cache.root / "org").read_text() == "mine"


# Servers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between attempts: what is counted is attempts."""
    monkeypatch.setattr("aim_runtime.cache.fetch._FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("aim_runtime.cache.add._PAUSE_S", 0.001)


@pytest.fixture
def odd() -> Iterator[Odd]:
    with odd_http(Odd({"/m.gguf": WEIGHTS})) as serving:
        yield serving


WEIGHTS = os.urandom(300_000)


def test_an_empty_file_of_a_server_that_has_no_range_of_it(cache: Cache, odd: Odd) -> None:
    """https://www.rfc-editor.org/rfc/rfc9110#status.416: nginx and S3 do."""
    odd.files["/empty.json"], odd.unsatisfiable = b"", True
    (file,) = add(cache, parse_uri(f"{odd.url}/empty.json"), OPTIONS).entry.files
    assert file.size == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("heads", "moved", "said", "asked"),
    [
        ({"Content-Encoding": "gzip"}, {}, "sends it compressed \\('gzip'\\)", 1),
        ({"Content-Length": "999999"}, {}, "ended after 300000 of 999999 bytes|broke off", None),
        ({"Content-Length": "-5"}, {}, "does not say how long", 1),
        ({"Content-Range": "bytes 5-9/300000"}, {}, "sent 'bytes 5-9/300000' for bytes from", None),
        ({}, {"/m.gguf": "file:///etc/passwd"}, "redirects to what is no address", 1),
        ({}, {"/m.gguf": "http://[broken/"}, "redirects to what is no address", 1),
        ({}, {"/m.gguf": "/m.gguf"}, "TooManyRedirects", None),
    ],
)
def test_a_server_that_lies(
    cache: Cache, odd: Odd, heads: dict[str, str], moved: dict[str, str], said: str, asked: int | None
) -> None:
    odd.heads, odd.moved, odd.ranges = heads, moved, "Content-Range" in heads
    odd.cuts, odd.cut_bytes = ("Content-Range" in heads), 1000
    with pytest.raises(CacheError, match=said):
        add(cache, parse_uri(f"{odd.url}/m.gguf"), replace(OPTIONS, stall_s=0.3))
    assert asked is None or len(odd.requests) == asked
    assert cache.entries() == []
    assert not cache.link("m").exists()


def test_a_password_is_for_its_host_alone_and_kept_nowhere(
    cache: Cache, odd: Odd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with odd_http(Odd({"/other.gguf": WEIGHTS})) as other:
        odd.moved = {"/m.gguf": other.url.replace("127.0.0.1", "localhost") + "/other.gguf"}
        add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS)
    assert all("authorization" in each for each in odd.headers)
    assert other.headers
    assert not any("authorization" in each for each in other.headers)
    assert "s3cret" not in kept(cache)


def kept(cache: Cache) -> str:
    """All texts of ours that lie on the volume."""
    return "".join(path.read_text() for path in cache.own.rglob("*") if path.suffix == ".json")


@pytest.mark.usefixtures("quick")
def test_a_signature_is_not_kept_beside_a_cut_fetch_and_the_next_one_goes_on(
    cache: Cache, odd: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd.cuts, odd.cut_bytes = 1, 100_000

    def gone(*_: object) -> None:
        raise CacheError("the user left")

    with monkeypatch.context() as leaving:
        leaving.setattr("aim_runtime.cache.fetch.Fetch._pause", gone)
        with pytest.raises(CacheError, match="the user left"):
            add(cache, parse_uri(f"{odd.url}/m.gguf?sig=s3cret"), OPTIONS)
    assert list((cache.own / "partial").rglob("*.part"))
    assert "s3cret" not in kept(cache)
    added = add(cache, parse_uri(f"{odd.url}/m.gguf?sig=n3wer"), OPTIONS)
    assert added.reused_bytes == 100_000
    assert "n3wer" not in kept(cache)


PAGE = """<html><a href="?C=N;O=D">sort</a> <a href="../">up</a> <a href='m.gguf'>m</a> <A HREF="/d/sub/">sub</A>
<a href="http://127.0.0.1:1/elsewhere.json">x</a> <a href="/other/x.json">x</a> <a href="file:///etc/passwd">x</a>
<a href="./">again</a> <a name=x>no</a> <a href="javascript:alert(1)">x</a> <a href="http://[x/">x</a>"""


def test_an_index_page_is_followed_below_its_directory_alone(cache: Cache, odd: Odd) -> None:
    odd.files |= {
        "/d/": PAGE.encode(),
        "/d/m.gguf": WEIGHTS,
        "/d/sub/": b"<a href=tokenizer&amp;.json>x</a><a href='/d/'>up</a><a href='sub/'>deeper</a>",
        "/d/sub/tokenizer&.json": b"{}",
        "/d/sub/sub/": b"<a href='../../sub/'>round</a>",
    }
    entry = add(cache, parse_uri(f"{odd.url}/d/?sig=s3cret"), replace(OPTIONS, include=("*",))).entry
    assert [file.path for file in entry.files] == ["m.gguf", "sub/tokenizer&.json"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("page", "said"),
    [
        (b"<a href='%2e%2e/%2e%2e/evil.json'>x</a>", "would not stay in the model's directory"),
        (b"<a href='a%0ab.json'>x</a>", "would not stay in the model's directory"),
        (b"<a href='x'>x</a>" * 600_000, "index page is longer than"),
        (b"nothing", "lists no file"),
        (b"\xff\xfe<a href=\xff.json>", "answers 404"),
    ],
)
def test_an_index_page_that_is_none(cache: Cache, odd: Odd, page: bytes, said: str) -> None:
    odd.files["/d/"] = page
    with pytest.raises(CacheError, match=said):
        add(cache, parse_uri(f"{odd.url}/d/"), OPTIONS)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b"null", b'{"sha": "\\u001b[2J"}', b'{"sha": 7}'])
def test_a_hub_that_answers_garbage(cache: Cache, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Odd({"/api/models/org/m/revision/main": answer}, types={"/api/models/org/m/revision/main": "text/json"})
    with odd_http(serving):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", serving.url)
        with pytest.raises(CacheError, match=r"^hf://org/m: the hub ") as refused:
            add(cache, parse_uri("hf://org/m"), OPTIONS)
    assert str(refused.value).isprintable()
    assert [path for path, _ in serving.requests].count("/api/models/org/m/revision/main") == 1  # not tried again


@pytest.mark.parametrize("config", ["{bad", "[]", '{"auths": {"HOST": {"auth": "%%%"}}}', '{"auths": 7}'])
def test_a_broken_docker_configuration_is_one_line(
    cache: Cache, tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".docker").mkdir()
    with odd_http(Odd({})) as serving:
        host = serving.url.removeprefix("http://")
        (tmp_path / ".docker/config.json").write_text(config.replace("HOST", host))
        with pytest.raises(CacheError, match=r"config\.json cannot be read|no such file"):
            add(cache, parse_uri(f"oci://{host}/org/m:v1"), OPTIONS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_ends_a_fetch_from_a_silent_server_does_not_wait_for_it(cache: Cache, odd: Odd, number: int) -> None:
    odd.cuts, odd.cut_bytes, odd.silent_s = 9, 100_000, 600
    command = cache_command("add", f"{odd.url}/m.gguf", "--cache", str(cache.root), "--stall", "300")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as fetching:
        while len(odd.requests) < 2 or sum(path.stat().st_size for path in cache.own.rglob("*.part")) < 100_000:
            time.sleep(0.05)
        fetching.send_signal(number)
        _, err = fetching.communicate(timeout=30)
    assert fetching.returncode == 1
    assert err.splitlines()[-1] == "error: ended; what has been fetched stays, and the next add goes on with it"
    assert "Traceback" not in err
    odd.cuts = 0
    assert add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS).reused_bytes == 100_000
