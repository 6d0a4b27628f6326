"""Versions on a hub: huggingface_hub itself, against its HTTP interface as a fake server speaks it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from aim_trainer.errors import StoreError
from aim_trainer.publish.destinations.open import open_destination
from aim_trainer.publish.versions import Version, publish_files
from fake_hub import FakeHub

REPOSITORY = "hf://org/support-bot"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield hub


def published(folder: Path, **files: str) -> Version:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return publish_files(folder, open_destination(REPOSITORY, folder))


def test_a_version_is_a_tag_with_just_its_files(hub: FakeHub, tmp_path: Path) -> None:
    first = published(tmp_path / "1", README="one", old="gone in the next")
    second = published(tmp_path / "2", README="two")
    again = published(tmp_path / "3", README="one", old="gone in the next")
    assert [first.uri, second.uri, again.uri] == [f"{REPOSITORY}@v1", f"{REPOSITORY}@v2", f"{REPOSITORY}@v1"]
    assert not again.is_new
    assert set(hub.files("v1") or ()) == {"README", "old", "COMMIT.json"}
    assert set(hub.files("v2") or ()) == {"README", "COMMIT.json"}
    assert hub.created[0]["visibility"] == "private"
    assert not (tmp_path / "1/COMMIT.json").exists()


def test_publishers_at_once_have_tags_of_their_own(hub: FakeHub, tmp_path: Path) -> None:
    found: list[Version] = []
    threads = [
        threading.Thread(target=lambda at=at: found.append(published(tmp_path / f"{at}", README=f"text {at}")))
        for at in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(version.number for version in found) == [1, 2, 3]
    for version in found:
        files = hub.files(version.name) or {}
        assert version.digest in files["COMMIT.json"].decode()


def test_a_hub_that_refuses_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.refuse = 403
    with pytest.raises(StoreError, match=r"hf://org/support-bot: the hub answers 403; set HF_TOKEN"):
        published(tmp_path / "1", README="one")
    assert hub.tags == {}
    with pytest.raises(StoreError, match=r"^hf://org/support-bot: the hub answers 403"):
        open_destination(REPOSITORY, tmp_path).check()
    assert len(hub.created) == 1  # by publishing alone


def test_a_hub_is_looked_at_before_there_is_anything_to_publish(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_destination(REPOSITORY, tmp_path).check()
    hub.missing = True
    open_destination(REPOSITORY, tmp_path).check()
    with pytest.raises(StoreError, match="HF_TOKEN is of somebody, org, not of others; set HF_TOKEN"):
        open_destination("hf://others/bot", tmp_path).check()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(StoreError, match="hf://org/support-bot: no token; set HF_TOKEN"):
        open_destination(REPOSITORY, tmp_path).check()
    assert hub.created == []
