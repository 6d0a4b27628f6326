"""Whatever ends a fetch, at whatever byte: half a model is never found, and the next attempt goes on.

Two kills and each fourth step as a test; ``make soak`` asks for ``SOAK_KILLS`` and all steps, and prints what it saw.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aim_runtime.cache.add import Options, add
from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.index import Cache
from aim_runtime.cache.uri import parse_uri
from aim_runtime.cache.use import cached
from aim_runtime.cache.verify import verify
from model_sources import Wire, cache_command, cache_verb, digests, random_model
from rclone_servers import S3_ENVIRONMENT, http_server, s3_server

SOAK = "SOAK_KILLS" in os.environ
KILLS = int(os.environ.get("SOAK_KILLS", "2"))
MIB = 2**20
FILES = 3
#: What is under way when a process is killed: a chunk and the buffers of both sockets, for each file.
LOSS_BYTES = FILES * 2 * MIB


def test_killed_at_random_bytes_of_a_fetch_from_s3(tmp_path: Path) -> None:
    sizes = [max(40, 4 * KILLS) * MIB // FILES + number for number in range(FILES)]
    expected = random_model(tmp_path / "s3/bucket/m", *sizes)
    cache, uri = Cache(tmp_path / "cache"), "s3://bucket/m"
    dice, seen, passed = random.Random(), 0, 0
    with s3_server(tmp_path / "s3") as port, Wire(port) as wire:
        environment = {**os.environ, **S3_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.port}"}
        command = cache_command("add", uri, "--name", "org/m", "--cache", str(cache.root))
        for left in range(KILLS, 0, -1):
            started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            missing = sum(sizes) - here(cache)
            first = (
                4096 if SOAK else missing // (2 * (left + 1))
            )  # of few kills none is so early that it proves nothing
            wire.at(wire.bytes + dice.randrange(first, 2 * missing // (left + 1)), started.kill)
            seen += started.wait(120) == -signal.SIGKILL
            with pytest.raises(CacheError, match="is not in the cache"):
                cached(cache.root, uri)
            assert not (cache.root / "org").exists()
        passed = here(cache)
        ended = cache_verb(*command[4:], env=environment)
    assert ended.returncode == 0, ended.stderr
    again = wire.bytes - sum(sizes)
    print(f"\n{seen} kills: {passed / MIB:.1f} of {sum(sizes) / MIB:.0f} MiB kept, {again / MIB:.1f} MiB fetched again")
    assert seen == KILLS
    assert passed > sum(sizes) / 6
    assert again <= KILLS * LOSS_BYTES
    assert digests(cached(cache.root, uri)) == digests((cache.root / "org/m").resolve()) == expected
    assert [found.bad for found in verify(cache, cache.entries(), quick=False)] == [{}]
    assert not any((cache.own / "partial").iterdir())


def here(cache: Cache) -> int:
    return sum(
        path.stat().st_size for path in (cache.own / "partial").rglob("*") if path.suffix in (".part", ".safetensors")
    )


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ends the process' work at its n-th durable step, before or after the step."""
    left = [0]

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            done = real(*args, **options)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return done

        return step

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "symlink_to"), (Path, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    yield lambda count: left.__setitem__(0, count)
    left[0] = 0


def test_ended_at_each_step(tmp_path: Path, steps: Callable[[int], None]) -> None:
    expected = random_model(tmp_path / "m", 5000, 100)
    uri = parse_uri(str(tmp_path / "m"))
    for number in range(1, 500) if SOAK else range(random.randrange(1, 5), 500, 4):
        cache = Cache(tmp_path / f"cache{number}")
        steps(number)
        try:
            add(cache, uri, Options())
        except Killed:
            ended = True
        else:
            ended = False
        steps(0)
        found = cache.find(uri.text)
        link = cache.root / "m"
        assert found is None or digests(cache.content(found.key)) == expected
        assert not link.is_symlink() or digests(link.resolve()) == expected
        add(cache, uri, Options())
        assert digests((cache.root / "m").resolve()) == expected
        assert [entry.state for entry in cache.entries()] == ["complete"]
        shutil.rmtree(cache.root)
        if not ended:
            break
    assert number > 30


def test_of_two_processes_the_second_uses_what_the_first_fetched(tmp_path: Path) -> None:
    expected = random_model(tmp_path / "www/m", 8 * MIB)
    with http_server(tmp_path / "www") as port, Wire(port) as wire:
        command = cache_command("add", f"http://127.0.0.1:{wire.port}/m/", "--cache", str(tmp_path / "cache"))
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = sorted(process.communicate(timeout=60)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert "fetched" in said[0]
    assert "was here" in said[1]
    assert wire.bytes < 16 * MIB  # the model once; probes are cut off after what the sockets hold
    assert digests((tmp_path / "cache/m").resolve()) == expected


def test_who_holds_the_lock_is_said_and_waiting_is_bounded(tmp_path: Path) -> None:
    random_model(tmp_path / "m", 10)
    cache = Cache(tmp_path / "cache")
    holder = (
        "import sys, pathlib; from aim_runtime.cache.locks import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1]), 5): print('held', flush=True); sys.stdin.read()"
    )
    command = [*cache_command()[:1], "-c", holder, str(cache.lock("m"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        refused = cache_verb("add", str(tmp_path / "m"), "--cache", str(cache.root), "--wait", "0.2")
        assert refused.returncode == 1
        assert f"process {other.pid} on " in refused.stderr.splitlines()[-1]
        other.kill()  # the kernel takes its lock away
    assert cache_verb("add", str(tmp_path / "m"), "--cache", str(cache.root), "--wait", "5").returncode == 0


def test_a_full_disk_ends_it_with_one_line_and_room_lets_it_go_on(tmp_path: Path) -> None:
    expected = random_model(tmp_path / "m", 3 * MIB)
    arguments = ("add", str(tmp_path / "m"), "--cache", str(tmp_path / "cache"))
    full = cache_verb(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)))
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith(
        "error: model-00001-of-00001.safetensors: File too large on the cache's"
    )
    assert not (tmp_path / "cache/m").exists()
    kept = cache_verb(*arguments, "-o", "json")
    assert kept.returncode == 0, kept.stderr
    assert json.loads(kept.stdout)[0]["reused_bytes"] >= MIB
    assert digests((tmp_path / "cache/m").resolve()) == expected


def test_too_little_room_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    source = tmp_path / "m"
    random_model(source, 10)
    os.truncate(source / "model-00001-of-00001.safetensors", 2**43)  # sparse: it takes no room itself
    with pytest.raises(CacheError, match=r"8192\.0 GiB are to be fetched, .* GiB short; make room"):
        add(Cache(tmp_path / "cache"), parse_uri(str(source)), Options())
    assert not list((tmp_path / "cache").rglob("*.part"))
