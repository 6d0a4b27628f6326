"""A checkpoint is whole or it is not one: torn, corrupt, foreign and future ones are named and passed over."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aim_trainer.checkpoints.checkpoint import Identity
from aim_trainer.checkpoints.store import PlacedCheckpoints, open_store
from aim_trainer.errors import StoreError
from aim_trainer.job.job import Checkpoints
from aim_trainer.places.open import open_place
from aim_trainer.places.place import Place
from ports import free_ports
from rclone_servers import S3_ENVIRONMENT, s3_server

OURS = Identity("support-bot", "spec1", "data1")


def files(directory: Path, content: bytes = b"weights") -> Path:
    (directory / "sub").mkdir(parents=True, exist_ok=True)
    (directory / "adapter.safetensors").write_bytes(content * 1000)
    (directory / "sub/rng-0.pt").write_bytes(os.urandom(100))
    return directory


@pytest.fixture
def s3_uri(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture(params=["directory", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "directory" else request.getfixturevalue("s3_uri")


def opened(uri: str, identity: Identity = OURS, **keep: object) -> PlacedCheckpoints:
    return open_store(uri, identity, Checkpoints.model_validate(keep), patience_s=20)


def place_of(store: PlacedCheckpoints) -> Place:
    return open_place(store.uri, patience_s=20)


def steps(store: PlacedCheckpoints) -> list[str]:
    return list(place_of(store).folders())


def test_what_was_saved_comes_back(uri: str, tmp_path: Path) -> None:
    store, source = opened(uri), files(tmp_path / "source")
    assert store.newest_valid() is None
    store.save(200, source, 2, {"eval_loss": 1.5})
    saved = store.save(1_000_000, source, 2, {"eval_loss": 1.25, "perplexity": float("nan")})
    found = opened(uri).newest_valid()
    assert found is not None
    assert (found.step, found.world_size, found.metrics) == (1_000_000, 2, {"eval_loss": 1.25})
    assert found.uri == saved.uri
    assert steps(store) == ["step-000200", "step-1000000"]
    for known in (store, opened(uri)):  # one that verified it, and one that did not
        into = known.fetch(found, tmp_path / f"into-{id(known)}")
        for name in ("adapter.safetensors", "sub/rng-0.pt"):
            assert (into / name).read_bytes() == (source / name).read_bytes()


def test_the_same_step_again_replaces_it(uri: str, tmp_path: Path) -> None:
    store = opened(uri)
    store.save(1, files(tmp_path / "old", b"old"), 1, {})
    found = store.save(1, files(tmp_path / "new", b"new"), 1, {})
    assert (store.fetch(found, tmp_path / "into") / "adapter.safetensors").read_bytes() == b"new" * 1000
    assert len(place_of(store).files()) == 3  # COMMIT.json and the new files


def spoil_torn(place: Place) -> None:
    place.remove("COMMIT.json")


def spoil_flipped(place: Place) -> None:
    (name,) = (entry.name for entry in place.files() if entry.name.endswith("adapter.safetensors"))
    place.write_bytes(name, b"w" + b"eights"[::-1] + place.read_bytes(name)[7:])


def spoil_short(place: Place) -> None:
    (name,) = (entry.name for entry in place.files() if entry.name.endswith("adapter.safetensors"))
    place.write_bytes(name, b"short")


def spoil_missing(place: Place) -> None:
    (name,) = (entry.name for entry in place.files() if entry.name.endswith("rng-0.pt"))
    place.remove(name)


def spoil_commit(place: Place) -> None:
    place.write_bytes("COMMIT.json", place.read_bytes("COMMIT.json")[:-30])


def changed(place: Place, **fields: object) -> None:
    place.write_bytes("COMMIT.json", json.dumps({**json.loads(place.read_bytes("COMMIT.json")), **fields}).encode())


def spoil_version(place: Place) -> None:
    changed(place, version=2)


def spoil_identity(place: Place) -> None:
    changed(place, identity={"run": "support-bot", "spec_digest": "spec1", "data_digest": "other"})


def spoil_files(place: Place) -> None:
    changed(place, files={})


def spoil_step(place: Place) -> None:
    changed(place, step=100)


def spoil_way_out(place: Place) -> None:
    known = json.loads(place.read_bytes("COMMIT.json"))["files"]["sub/rng-0.pt"]
    changed(place, files={"../../../../x": known})


SPOILT = [
    (spoil_torn, "torn: it has no COMMIT.json"),
    (spoil_flipped, "corrupt: adapter.safetensors is not what was written"),
    (spoil_short, "corrupt: adapter.safetensors is not"),
    (spoil_missing, "corrupt: sub/rng-0.pt"),
    (spoil_commit, "corrupt: COMMIT.json cannot be read"),
    (spoil_version, "COMMIT.json is of version 2, this release knows 1"),
    (spoil_identity, "of another job: other data_digest"),
    (spoil_files, "corrupt: COMMIT.json: files"),
    (spoil_step, "corrupt: COMMIT.json is of step 100"),
    (spoil_way_out, "corrupt: COMMIT.json: the name '../../../../x' is refused"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILT)
def test_what_is_no_checkpoint_is_named_and_passed_over(
    tmp_path: Path, spoil: Callable[[Place], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    passed_over(str(tmp_path / "checkpoints"), tmp_path, spoil, says, caplog)


@pytest.mark.parametrize(("spoil", "says"), SPOILT[:4])
def test_so_it_is_in_s3(
    s3_uri: str, tmp_path: Path, spoil: Callable[[Place], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    passed_over(s3_uri, tmp_path, spoil, says, caplog)


def passed_over(
    uri: str, tmp_path: Path, spoil: Callable[[Place], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(uri)
    store.save(100, files(tmp_path / "source"), 1, {})
    store.save(200, files(tmp_path / "source"), 1, {})
    spoil(place_of(store).at("step-000200"))
    with caplog.at_level(logging.WARNING, "aim_trainer"):
        found = opened(uri).newest_valid()
    assert found is not None
    assert found.step == 100
    assert f"{store.uri}/step-000200: not resumed from: {says}" in caplog.text


def test_checkpoints_of_another_job_are_another_folder(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = opened(uri, Identity("support-bot", "spec2", "data1"))
    theirs.save(100, files(tmp_path / "source"), 1, {})
    store = opened(uri, keepLast=1)
    with caplog.at_level(logging.WARNING, "aim_trainer"):
        assert store.newest_valid() is None
    assert theirs.uri.rpartition("/")[2] in caplog.text
    store.save(100, files(tmp_path / "source"), 1, {})
    store.save(200, files(tmp_path / "source"), 1, {})
    store.prune()
    assert theirs.newest_valid() is not None


def test_the_last_and_the_best_stay(uri: str, tmp_path: Path) -> None:
    store = opened(uri, keepLast=2, keepBest={"metric": "eval_loss", "mode": "min"})
    source = files(tmp_path / "source")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0), (5, 2.5), (6, 2.6)):
        store.save(step, source, 1, {"eval_loss": loss})
    place = place_of(store)
    place.write_bytes("step-000003/garbage", b"")
    place.at("step-000003").remove("COMMIT.json")
    place.write_bytes("step-000009/half", b"another writer is at it")
    store.prune()
    # Of two that are as good the later one stays; what was begun after the newest may be another writer's.
    assert steps(store) == ["step-000004", "step-000005", "step-000006", "step-000009"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, source = opened(str(tmp_path / "checkpoints")), files(tmp_path / "source")
    store.save(100, source, 1, {})
    copy, copied = shutil.copyfile, []

    def full(source: Path, target: Path) -> None:
        if copied:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copied.append(copy(source, target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(
        StoreError, match=r"step-000200 was not saved \(0.0 MiB\): .*no space left; free some, .*resume"
    ):
        store.save(200, source, 1, {})
    found = store.newest_valid()
    assert found is not None
    assert found.step == 100
    assert not any(path.is_file() for path in Path(store.uri, "step-000200").rglob("*"))


def test_two_who_write_the_same_step_leave_one_whole_checkpoint(uri: str, tmp_path: Path) -> None:
    sources = [files(tmp_path / name, name.encode()) for name in ("one", "two", "three")]
    start = threading.Barrier(len(sources))

    def write(source: Path) -> None:
        store = opened(uri)
        start.wait()
        store.save(7, source, 1, {})

    writers = [threading.Thread(target=write, args=(source,)) for source in sources]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = opened(uri).newest_valid()
    assert found is not None
    into = opened(uri).fetch(found, tmp_path / "into")
    assert any(
        all(
            (into / name).read_bytes() == (source / name).read_bytes()
            for name in ("adapter.safetensors", "sub/rng-0.pt")
        )
        for source in sources
    )


def test_s3_that_is_away_for_a_while_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3/bucket").mkdir(parents=True)
    (port,) = free_ports(1)
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    store, source = opened("s3://bucket/x"), files(tmp_path / "source")
    with s3_server(tmp_path / "s3", port, written_to=True):
        store.save(1, source, 1, {})
    saved: list[int] = []
    writer = threading.Thread(target=lambda: saved.append(store.save(2, source, 1, {}).step))
    writer.start()
    writer.join(3)
    assert writer.is_alive()
    with s3_server(tmp_path / "s3", port, written_to=True):
        writer.join(60)
        assert saved == [2]
        found = store.newest_valid()
        assert found is not None
        assert found.step == 2
