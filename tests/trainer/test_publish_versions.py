"""Versions: whole or not there, never written twice, one for equal content, whoever publishes at once."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from aim_trainer.errors import StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.places.open import open_place
from aim_trainer.publish.beforehand import check_places
from aim_trainer.publish.destinations.in_place import InPlace
from aim_trainer.publish.destinations.open import open_destination
from aim_trainer.publish.versions import Version, commit_of, name_of, number_of, publish_files
from asked_runtime import ROOT, SERVING
from docker_registry import Registry
from rclone_servers import S3_ENVIRONMENT, s3_server

REGISTRY_MISSING = not any(Path(folder, "docker-registry").exists() for folder in os.environ["PATH"].split(":"))


@pytest.fixture(params=["directory", "s3", pytest.param("oci", marks=pytest.mark.system)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty destination of each kind."""
    if request.param == "directory":
        yield str(tmp_path / "registry")
    elif request.param == "s3":
        (tmp_path / "s3/bucket").mkdir(parents=True)
        with s3_server(tmp_path / "s3", written_to=True) as port:
            for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
                monkeypatch.setenv(name, value)
            yield "s3://bucket/models/support-bot"
    else:
        if REGISTRY_MISSING:
            pytest.skip("docker-registry is missing: make system-deps")
        with Registry(tmp_path / "oci") as registry:
            yield f"oci://{registry.host}/models/support-bot"


def files(folder: Path, **content: str) -> Path:
    for name, text in content.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def published(uri: str, folder: Path) -> Version:
    return publish_files(folder, open_destination(uri, folder))


def publishing(registry: str) -> FineTuningJob:
    """A job whose registry that is, whatever it says."""
    raw: dict[str, Any] = {"metadata": {"name": "bot"}, "spec": {"dataset": {"source": "chat.jsonl"}}}
    raw["spec"] |= {"baseModel": {"modelId": "org/model"}, "output": {}}
    job = FineTuningJob.model_validate(raw | {"apiVersion": "aim.amd.com/v1alpha1", "kind": "FineTuningJob"})
    output = job.spec.output.model_copy(update={"registry": registry})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"output": output})})


def test_each_content_is_a_version_and_the_same_content_is_the_same_one(place: str, tmp_path: Path) -> None:
    one = files(tmp_path / "one", README="one", gguf__model="weights")
    other = files(tmp_path / "other", README="other")
    first = published(place, one)
    second = published(place, other)
    again = published(place, files(tmp_path / "copy", README="one", gguf__model="weights"))
    assert [first.name, second.name, again.name] == ["v1", "v2", "v1"]
    assert [first.is_new, second.is_new, again.is_new] == [True, True, False]
    assert again.uri == first.uri
    assert again.digest == first.digest != second.digest
    assert open_destination(place, one).published() == {1: first.digest, 2: second.digest}


def test_a_place_is_looked_at_and_left_as_it_was(place: str, tmp_path: Path) -> None:
    check_places(publishing(place))
    one = files(tmp_path / "one", README="one")
    first = published(place, one)
    check_places(publishing(place))
    assert open_destination(place, one).published() == {1: first.digest}
    assert published(place, files(tmp_path / "two", README="two")).name == "v2"


def test_publishers_at_once_take_numbers_of_their_own(place: str, tmp_path: Path) -> None:
    folders = [files(tmp_path / f"of-{at}", README=f"text {at}") for at in range(4)]
    found: list[Version] = []
    threads = [
        threading.Thread(target=lambda folder=folder: found.append(published(place, folder))) for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({version.number for version in found}) == 4
    held = open_destination(place, tmp_path).published()
    assert sorted(digest for digest in held.values() if digest) == sorted(
        commit_of(folder).digest for folder in folders
    )


def test_the_runtimes_cache_takes_a_version_as_it_is(place: str, tmp_path: Path) -> None:
    if not SERVING.is_file():
        pytest.skip(f"{SERVING} is missing: make test sets it up")
    content = {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights", "README.md": "card"}
    version = published(place, files(tmp_path / "one", **content))
    roots = os.pathsep.join(str(ROOT / name) for name in ("runtimes", "profiles"))
    command = [str(SERVING), "-m", "aim_runtime", "cache", "add", version.uri, "--cache", str(tmp_path / "cache")]
    env = {**os.environ, "PYTHONPATH": roots, "PYTHONSAFEPATH": "1"}
    added = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=100)
    assert added.returncode == 0, added.stderr
    (held,) = (tmp_path / "cache").rglob("model.safetensors")
    assert held.read_text() == "weights"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def test_a_version_holds_its_files_and_what_they_must_be(registry: Path, tmp_path: Path) -> None:
    version = published(str(registry), files(tmp_path / "one", README="one", gguf__model="weights"))
    assert (registry / "v1/gguf/model").read_text() == "weights"
    assert (registry / "latest").read_text() == "v1\n"
    commit = json.loads((registry / "v1/COMMIT.json").read_text())
    assert commit["digest"] == version.digest
    assert set(commit["files"]) == {"README", "gguf/model"}
    assert not any((registry / ".claims").iterdir())


class Torn(Exception):
    """Where a publisher is killed in a test."""


@pytest.mark.parametrize("written", range(5))
def test_what_a_killed_publisher_leaves_is_no_version_and_keeps_its_number(
    registry: Path, tmp_path: Path, written: int
) -> None:
    """Killed before the claim, after it, after each file, before the commit: not even `finally` runs then."""
    before = published(str(registry), files(tmp_path / "zero", README="zero"))
    folder = files(tmp_path / "one", A="a", B="b", C="c")

    class Killed:
        def __init__(self) -> None:
            self._place, self._left = open_place(str(registry)), written

        def __getattr__(self, name: str) -> object:
            return getattr(self._place, name)

        def write(self, name: str, file: Path) -> None:
            self._gone()
            self._place.write(name, file)

        def write_bytes(self, name: str, data: bytes) -> None:
            self._gone()
            self._place.write_bytes(name, data)

        def remove(self, name: str = "") -> None:
            raise Torn

        def _gone(self) -> None:
            if not self._left:
                raise Torn
            self._left -= 1

    with pytest.raises(Torn):
        publish_files(folder, InPlace(Killed()))  # type: ignore[arg-type]
    assert (registry / "latest").read_text() == "v1\n"
    held = open_destination(str(registry), folder).published()
    assert {number: digest for number, digest in held.items() if digest} == {1: before.digest}
    after = published(str(registry), folder)
    assert after.name == ("v2" if written == 0 else "v3")
    assert (registry / "latest").read_text() == f"{after.name}\n"
    assert not (registry / "v2/COMMIT.json").exists() or written == 0


@given(st.integers(min_value=1, max_value=10**9))
def test_names_and_numbers_are_each_others(number: int) -> None:
    assert number_of(name_of(number)) == number


@pytest.mark.parametrize("name", ["", "v", "v0", "v01", "v1.claim", "latest", "v-1", "v٣", "V1", "v1 "])
def test_what_is_no_version_has_no_number(name: str) -> None:
    assert number_of(name) is None


def test_a_registry_shows_a_version_as_files_with_titles(tmp_path: Path) -> None:
    if REGISTRY_MISSING:
        pytest.skip("docker-registry is missing: make system-deps")
    with Registry(tmp_path / "oci") as registry:
        version = published(f"oci://{registry.host}/bot", files(tmp_path / "one", README="one", gguf__model="weights"))
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        manifest = requests.get(f"http://{registry.host}/v2/bot/manifests/v1", headers=accept, timeout=30).json()
        titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]]
        assert titles == ["README", "gguf/model", "COMMIT.json"]
        assert version.uri == f"oci://{registry.host}/bot:v1"
        latest = requests.get(f"http://{registry.host}/v2/bot/manifests/latest", headers=accept, timeout=30).json()
        assert latest == manifest


def test_a_registry_that_wants_a_password_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if REGISTRY_MISSING:
        pytest.skip("docker-registry is missing: make system-deps")
    monkeypatch.setenv("HOME", str(tmp_path))
    with Registry(tmp_path / "oci") as registry, registry.with_password() as host:
        with pytest.raises(StoreError, match=r"wants credentials; log in: docker login"):
            published(f"oci://{host}/bot", files(tmp_path / "one", README="one"))
        with pytest.raises(
            StoreError, match=r"^spec\.output\.registry: oci://.*wants credentials; log in: docker"
        ) as told:
            check_places(publishing(f"oci://{host}/bot"))
        assert (told.value.field, told.value.value) == ("spec.output.registry", f"oci://{host}/bot")


@pytest.mark.parametrize(
    ("registry", "why"),
    [
        ("/proc/registry", r"/proc/registry/\.claims/v0\.[0-9a-f]+: no such file"),
        ("/dev/null/registry", r"/dev/null/registry/.*: Not a directory"),
        ("oci://127.0.0.1:1/bot", "cannot be reached .*check the registry's address"),
        ("gs://bucket/models", "gs:// is not read or written here"),
        ("oci://host/bot:v1", "give oci://HOST/REPOSITORY, without a tag or revision"),
    ],
)
def test_a_place_that_cannot_be_published_to_is_told_by_its_field(registry: str, why: str) -> None:
    with pytest.raises(StoreError, match=rf"^spec\.output\.registry: .*{why}") as told:
        check_places(publishing(registry))
    assert (told.value.field, told.value.value) == ("spec.output.registry", registry)
    assert told.value.remedy


def test_s3_without_that_bucket_or_away_is_told_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        StoreError, match=r"^spec\.output\.registry: s3://bucket/bot.*: cannot be reached .*AWS_ENDPOINT_URL"
    ):
        check_places(publishing("s3://bucket/bot"), 0.1)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://host/models", "nothing can be published over HTTP"),
        ("hf://org", "give hf://ORG/NAME, without a tag or revision"),
        ("hf://org/name@v1", "without a tag or revision"),
        ("oci://host/models/bot:v1", "without a tag or revision"),
        ("oci://host", "give oci://HOST/REPOSITORY"),
        ("gs://bucket/models", "gs:// is not read or written here"),
    ],
)
def test_what_cannot_be_published_to_is_refused(uri: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=why):
        open_destination(uri, tmp_path)


def test_a_place_that_is_away_says_so(tmp_path: Path, port: int) -> None:
    with pytest.raises(StoreError, match="cannot be reached"):
        published(f"oci://127.0.0.1:{port}/bot", files(tmp_path / "one", README="one"))
