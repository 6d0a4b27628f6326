"""Models from HTTP, S3, Hugging Face and OCI: real servers; a double where one has to misbehave, or cannot be had."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from aim_runtime.cache.add import Added, Options, add
from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.fetch import Effort
from aim_runtime.cache.index import Cache
from aim_runtime.cache.uri import parse_uri
from docker_registry import MANIFEST, TITLE, Registry
from model_sources import cache_verb, digests, random_model
from odd_http import Odd, odd_http
from rclone_servers import S3_ENVIRONMENT, http_server, s3_server

WEIGHTS = os.urandom(3_000_000)
OPTIONS = Options(effort=Effort(2, 2), stall_s=5)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between attempts: what is counted is attempts."""
    monkeypatch.setattr("aim_runtime.cache.fetch._FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("aim_runtime.cache.add._PAUSE_S", 0.001)


def content(cache: Cache, added: Added) -> dict[str, str]:
    assert cache.is_current(added.entry)
    return digests(cache.link(added.entry.name).resolve())


@pytest.fixture
def odd() -> Iterator[Odd]:
    with odd_http(Odd({"/m.gguf": WEIGHTS})) as serving:
        yield serving


def test_a_directory_of_a_real_http_server(tmp_path: Path, cache: Cache) -> None:
    expected = random_model(tmp_path / "www/my m", 100_000, 50_000)
    (tmp_path / "www/my m/README.md").write_text("not needed")
    with http_server(tmp_path / "www") as port:
        added = add(cache, parse_uri(f"http://127.0.0.1:{port}/my%20m/"), OPTIONS)
        assert content(cache, added) == expected
        assert add(cache, parse_uri(f"http://127.0.0.1:{port}/my%20m/"), OPTIONS).hit
    assert added.entry.name == "my-m"


def test_a_cut_answer_is_continued_at_its_byte(cache: Cache, odd: Odd) -> None:
    odd.cuts, odd.cut_bytes = 4, 500_000
    added = add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS)
    assert content(cache, added) == {"m.gguf": hashlib.sha256(WEIGHTS).hexdigest()}
    starts = [asked for _, asked in odd.requests]
    assert starts == ["bytes=0-", None, *(f"bytes={number * 500_000}-" for number in range(1, 5))]
    assert added.fetched_bytes == len(WEIGHTS)


def test_a_connection_that_falls_silent_is_given_up_and_continued(cache: Cache, odd: Odd) -> None:
    odd.cuts, odd.cut_bytes, odd.silent_s = 1, 500_000, 3
    added = add(cache, parse_uri(f"{odd.url}/m.gguf"), replace(OPTIONS, stall_s=0.3))
    assert content(cache, added) == {"m.gguf": hashlib.sha256(WEIGHTS).hexdigest()}
    assert [asked for _, asked in odd.requests] == ["bytes=0-", None, "bytes=500000-"]


def test_a_file_that_changed_in_between_begins_anew(cache: Cache, odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    odd.cuts, odd.cut_bytes = 1, 500_000

    def gone(*_: object) -> None:
        raise CacheError("the user left")

    with monkeypatch.context() as leaving:
        leaving.setattr("aim_runtime.cache.fetch.Fetch._pause", gone)
        with pytest.raises(CacheError, match="the user left"):
            add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS)
    changed = odd.files["/m.gguf"] = os.urandom(len(WEIGHTS))
    odd.cuts = 0
    added = add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS)
    assert content(cache, added) == {"m.gguf": hashlib.sha256(changed).hexdigest()}
    assert added.fetched_bytes == len(WEIGHTS)


def test_a_file_that_changes_between_two_ranges_is_listed_again(
    cache: Cache, odd: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd.cuts, odd.cut_bytes = 1, 500_000
    changed = os.urandom(len(WEIGHTS) + 1)
    monkeypatch.setattr("aim_runtime.cache.fetch.Fetch._pause", lambda *_: odd.files.update({"/m.gguf": changed}))
    added = add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS)
    assert content(cache, added) == {"m.gguf": hashlib.sha256(changed).hexdigest()}


@pytest.mark.parametrize(("ranges", "etags"), [(False, True), (True, False)])
def test_without_ranges_or_validators_a_cut_begins_anew_but_ends_whole(
    cache: Cache, odd: Odd, ranges: bool, etags: bool
) -> None:
    odd.ranges, odd.etags, odd.cuts, odd.cut_bytes = ranges, etags, 2, 500_000
    added = add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS)
    assert content(cache, added) == {"m.gguf": hashlib.sha256(WEIGHTS).hexdigest()}


def test_transient_answers_are_tried_again_and_others_not(cache: Cache, odd: Odd) -> None:
    odd.statuses = [503, 429]
    assert not add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS).hit
    odd.statuses = [503] * 9
    with pytest.raises(CacheError, match=r"answers 503 \(given up after 3 attempts"):
        add(cache, parse_uri(f"{odd.url}/m.gguf?a=s3cret"), OPTIONS)
    odd.statuses, odd.requests[:] = [403], []
    with pytest.raises(CacheError, match=r"answers 403: for credentials see ~/.netrc"):
        add(cache, parse_uri(f"{odd.url}/m.gguf"), OPTIONS)
    assert len(odd.requests) == 1


def test_nobody_there_is_one_line_without_the_query(cache: Cache) -> None:
    with pytest.raises(CacheError, match="cannot be reached") as refused:
        add(cache, parse_uri("http://127.0.0.1:9/m.gguf?X-Sig=s3cret"), OPTIONS)
    assert "s3cret" not in str(refused.value)


def test_an_object_of_s3_that_does_not_hold_what_its_etag_says(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = random_model(tmp_path / "s3/bucket/a/m", 100_000)
    with s3_server(tmp_path / "s3") as port:
        for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        added = add(cache, parse_uri("s3://bucket/a/m"), OPTIONS)
        assert content(cache, added) == expected
        one = add(cache, parse_uri("s3://bucket/a/m/config.json"), OPTIONS)
        assert list(content(cache, one)) == ["config.json"]
        monkeypatch.setattr("aim_runtime.cache.sources.s3._digest", lambda head: ("md5", "0" * 32))
        with pytest.raises(CacheError, match=r"md5 is .*, the source promised 0000"):
            add(cache, parse_uri("s3://bucket/a/m"), replace(OPTIONS, name="other"))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng")
        with pytest.raises(CacheError, match="AWS_ACCESS_KEY_ID") as refused:
            add(cache, parse_uri("s3://bucket/a/m"), OPTIONS)
    assert "wr0ng" not in str(refused.value)
    assert cache.find("other") is None


COMMIT = "a" * 40


def hub(weights: bytes, config: bytes, extra: tuple[dict[str, object], ...] = ()) -> Odd:
    """What huggingface.co answers of a small repository (recorded; shortened to what the library reads)."""
    git = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    lfs = {"oid": hashlib.sha256(weights).hexdigest(), "size": len(weights), "pointerSize": 134}
    tree = [
        {"type": "directory", "oid": "b" * 40, "size": 0, "path": "original"},
        {"type": "file", "oid": git, "size": len(config), "path": "config.json"},
        {"type": "file", "oid": "c" * 40, "size": len(weights), "lfs": lfs, "path": "model.safetensors"},
        *extra,
    ]
    info = {"_id": "1", "id": "org/m", "modelId": "org/m", "sha": COMMIT, "private": False, "tags": [], "siblings": []}
    listed = {
        "/api/models/org/m/revision/main": json.dumps(info).encode(),
        f"/api/models/org/m/tree/{COMMIT}": json.dumps(tree).encode(),
    }
    files = {**listed, f"/org/m/resolve/{COMMIT}/config.json": config, "/cdn/blob": weights}
    moved = {f"/org/m/resolve/{COMMIT}/model.safetensors": "/cdn/blob?X-Amz-Signature=s3cret"}
    return Odd(files, moved=moved, types=dict.fromkeys(listed, "application/json"))


def test_a_repository_of_the_hub_at_one_commit(cache: Cache) -> None:
    config = b'{"model_type": "llama"}'
    with odd_http(hub(WEIGHTS, config)) as serving:
        serving.cuts, serving.cut_bytes = 1, 700_000
        environment = {"HF_ENDPOINT": serving.url, "HF_TOKEN": "hf_s3cret"}
        done = cache_verb("add", "hf://org/m", "--cache", str(cache.root), "-o", "json", env=environment)
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(done.stdout)
        assert (row["name"], row["revision"], row["fetched_bytes"]) == ("org/m", COMMIT, len(WEIGHTS) + len(config))
        assert ("/cdn/blob", "bytes=700000-") in serving.requests
        asked = [
            each
            for (path, _), each in zip(serving.requests, serving.headers, strict=True)
            if path.startswith("/org/m/")
        ]
        assert all(each.get("authorization") == "Bearer hf_s3cret" for each in asked)
        again = cache_verb(
            "prefetch", "hf://org/m", f"hf://org/m@{COMMIT}", "--cache", str(cache.root), env=environment
        )
        assert again.stdout.count("was here") == 2
    found = cache.find("org/m")
    assert found is not None
    assert digests(cache.content(found.key))["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert "s3cret" not in done.stderr + done.stdout + "".join(path.read_text() for path in cache._files())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("config", "config.json: git-sha1 is .*, the source promised"),
        ("path", "would not stay in the model's directory"),
        ("gone", "no such repository, or a private one: set HF_TOKEN"),
    ],
)
def test_what_the_hub_must_not_send(cache: Cache, spoil: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = ({"type": "file", "oid": "d" * 40, "size": 1, "path": "../../evil.json"},) if spoil == "path" else ()
    serving = hub(b"w", b"{}", evil)
    if spoil == "config":
        serving.files[f"/org/m/resolve/{COMMIT}/config.json"] = b"[]"
    if spoil == "gone":
        serving.files.clear()
    with odd_http(serving):
        template = f"{serving.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", serving.url)  # HF_ENDPOINT is read at import
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(CacheError, match=said):
            add(cache, parse_uri("hf://org/m"), OPTIONS)
    assert cache.entries() == []


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is missing: make system-deps")
    with Registry(tmp_path / "registry") as serving:
        yield serving


FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "tokenizer/tokenizer.json": b"[]"}


@pytest.mark.system
def test_an_artifact_of_a_real_registry_by_tag_and_digest(cache: Cache, registry: Registry) -> None:
    digest = registry.push("org/m", "v1", FILES)
    options = replace(OPTIONS, include=("*",))
    added = add(cache, parse_uri(f"oci://{registry.host}/org/m:v1"), options)
    assert content(cache, added) == {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert added.entry.revision == digest
    assert cache.find(f"oci://{registry.host}/org/m@{digest}") == added.entry
    registry.push("org/m", "v1", {**FILES, "config.json": b"{1}"})
    newer = add(cache, parse_uri(f"oci://{registry.host}/org/m:v1"), options)
    assert newer.fetched_bytes == 3  # the rest is copied from the older revision
    assert cache.find(f"oci://{registry.host}/org/m:v1") == newer.entry
    assert cache.find(f"oci://{registry.host}/org/m@{digest}") == added.entry


@pytest.mark.system
@pytest.mark.parametrize("spoil", ["cut", "flip", "longer"])
def test_a_registry_whose_layer_is_not_what_its_digest_says(cache: Cache, registry: Registry, spoil: str) -> None:
    registry.push("org/m", "v1", FILES)
    stored = registry.stored(WEIGHTS)
    spoilt = bytearray(WEIGHTS)
    spoilt[1_000_000] ^= 1
    stored.write_bytes({"cut": WEIGHTS[:-1], "flip": bytes(spoilt), "longer": WEIGHTS + b"x"}[spoil])
    with pytest.raises(CacheError, match=r"model\.safetensors"):
        add(cache, parse_uri(f"oci://{registry.host}/org/m:v1"), OPTIONS)
    assert cache.entries() == []
    assert not cache.link("org/m").exists()
    stored.write_bytes(WEIGHTS)
    assert content(cache, add(cache, parse_uri(f"oci://{registry.host}/org/m:v1"), OPTIONS))


@pytest.mark.system
def test_a_registry_that_wants_a_password_finds_it_where_docker_keeps_it(
    tmp_path: Path, cache: Cache, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = registry.push("org/m", "v1", FILES)
    with registry.with_password() as closed:
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(CacheError, match="docker login"):
            add(cache, parse_uri(f"oci://{closed}/org/m:v1"), OPTIONS)
        (tmp_path / ".docker").mkdir()
        said = {"auths": {closed: {"auth": base64.b64encode(b"user:s3cret").decode()}}}
        (tmp_path / ".docker/config.json").write_text(json.dumps(said))
        assert add(cache, parse_uri(f"oci://{closed}/org/m:v1"), OPTIONS).entry.revision == digest


def layer(data: bytes, **other: object) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {"mediaType": "x/y", "digest": digest, "size": len(data), "annotations": {TITLE: "m.gguf"}, **other}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([layer(b"x", annotations={TITLE: "../../evil.gguf"})], "would not stay in the model's directory"),
        ([layer(b"x", annotations={TITLE: "/etc/evil.gguf"})], "would not stay in the model's directory"),
        ([layer(b"x", annotations={TITLE: 7})], "would not stay in the model's directory"),
        ([layer(b"x", digest="sha256:../../../etc/passwd")], "is not a digest"),
        ([layer(b"x", digest=None)], "is not a digest"),
        ([layer(b"x", size=-1)], "gives no size"),
        ([layer(b"x", annotations={})], "no layer has a title"),
        ([layer(b"x"), layer(b"y")], "lists a file twice"),
        ("none", "lists no layers"),
    ],
)
def test_what_a_manifest_must_not_say(tmp_path: Path, cache: Cache, layers: object, said: str) -> None:
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": layers}).encode()
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    with odd_http(Odd({"/v2/org/m/manifests/v1": manifest})) as serving, pytest.raises(CacheError, match=said):
        add(cache, parse_uri(f"oci://{serving.url[7:]}/org/m:v1"), OPTIONS)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(cache.root)} == before
    assert cache.entries() == []


def test_a_manifest_that_is_not_the_one_of_the_digest(cache: Cache) -> None:
    digest = f"sha256:{'0' * 64}"
    manifest = json.dumps({"layers": [layer(b"x")]}).encode()
    with (
        odd_http(Odd({f"/v2/org/m/manifests/{digest}": manifest})) as serving,
        pytest.raises(CacheError, match=f"the registry sent sha256:{hashlib.sha256(manifest).hexdigest()}"),
    ):
        add(cache, parse_uri(f"oci://{serving.url[7:]}/org/m@{digest}"), OPTIONS)
