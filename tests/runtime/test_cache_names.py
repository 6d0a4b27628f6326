"""Sources, names, paths and the choice of files: pure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.selection import select
from aim_runtime.cache.source import RemoteFile
from aim_runtime.cache.uri import checked_name, parse_uri, safe_path, sha256_of

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("given_uri", "text", "location", "revision", "name"),
    [
        ("hf://org/m", "hf://org/m", "org/m", "", "org/m"),
        ("hf://org/m@main", "hf://org/m", "org/m", "", "org/m"),
        ("hf://org/m@refs/pr/1", "hf://org/m@refs/pr/1", "org/m", "refs/pr/1", "org/m"),
        ("s3://bucket/models/m/", "s3://bucket/models/m", "bucket/models/m", "", "m"),
        ("oci://r.io:5000/a/b", "oci://r.io:5000/a/b:latest", "r.io:5000/a/b", "latest", "a/b"),
        ("oci://r.io/a/b:v1", "oci://r.io/a/b:v1", "r.io/a/b", "v1", "a/b"),
        (f"oci://r.io/a/b:v1@{DIGEST}", f"oci://r.io/a/b@{DIGEST}", "r.io/a/b", DIGEST, "a/b"),
        ("https://H/m.gguf?X-Sig=s3cret", "https://h/m.gguf", "https://H/m.gguf?X-Sig=s3cret", "", "m"),
        ("file:///models/my%20m", "file:///models/my%20m", "/models/my m", "", "my-m"),
        ("/models/m.gguf", "file:///models/m.gguf", "/models/m.gguf", "", "m"),
    ],
)
def test_sources(given_uri: str, text: str, location: str, revision: str, name: str) -> None:
    uri = parse_uri(given_uri)
    assert (uri.text, uri.location, uri.revision, uri.name) == (text, location, revision, name)


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "",
            "gs://b/k",
            "hf://m",
            "hf://a/b/c",
            "hf://a/b@../x",
            "hf://a/b@",
            "s3://bucket",
            "s3://B/k",
            "s3://b/k?v=1",
        ),
        *(
            "https://host",
            "https://",
            "https://[::1",
            "http://u:p4ss@host/m",
            "oci://host",
            "oci://h/R:x",
            "oci://h/r@sha256:1",
        ),
        *("oci://h/r@sha256:../../etc", "file://other/m", "file:m\0", "hf://org/m\n", "s3://bu cket/k", "\ud800"),
    ],
)
def test_what_is_no_source(wrong: str) -> None:
    with pytest.raises(CacheError) as refused:
        parse_uri(wrong)
    assert "\n" not in str(refused.value)
    assert "p4ss" not in str(refused.value)


@given(st.text(max_size=60) | st.from_regex(r"(hf|s3|oci|https?|file)://[ -~]{0,40}", fullmatch=True))
def test_a_source_is_understood_or_refused(text: str) -> None:
    try:
        uri = parse_uri(text)
    except CacheError:
        return
    assert parse_uri(uri.text).text == uri.text  # the index finds again what it has written
    assert "?" not in uri.text


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["..", ".", "a", "", "b.c", "\\", "\0", "~"]), max_size=6).map("/".join)
)
@example("a/../../b")
@example("/etc/passwd")
@example("a/" * 600 + "b")
def test_a_safe_path_stays_below(text: str) -> None:
    try:
        path = safe_path(text, "m")
    except CacheError:
        return
    root = Path("/cache/content")
    assert (root / path).resolve().is_relative_to(root)
    assert path == text
    assert ".." not in Path(path).parts
    assert len(path.encode()) <= 1024


def test_ordinary_paths_are_safe() -> None:
    for path in ("config.json", "original/params.json", "a..b", ".gitattributes", "é/ü.json"):
        assert safe_path(path, "m") == path


@given(st.text(max_size=100))
def test_a_digest_is_a_digest(text: str) -> None:
    try:
        found = sha256_of(text, "m")
    except CacheError:
        return
    assert re.fullmatch("[0-9a-f]{64}", found)


@pytest.mark.parametrize(
    "wrong", ["", "../m", "/m", "a//b", ".aim-cache", "a/.b", "hub/x", "a--b", "a/b/c/d/e", "a b", "a\n"]
)
def test_what_is_no_name(wrong: str) -> None:
    with pytest.raises(CacheError, match="--name"):
        checked_name(wrong)


def chosen(*paths: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    return [file.path for file in select([RemoteFile(path, 1, path) for path in paths], include, exclude, "m")]


HF = ("README.md", ".gitattributes", "config.json", "tokenizer.json", "model.safetensors.index.json")


def test_one_format_of_weights_and_what_serves_it() -> None:
    shards = ("model-1.safetensors", "model-2.safetensors")
    others = (
        "pytorch_model.bin",
        "tf_model.h5",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/m.onnx",
    )
    assert chosen(*HF, *shards, *others) == [
        *("config.json", *shards, "model.safetensors.index.json", "tokenizer.json"),
    ]
    assert chosen(*HF, "pytorch_model.bin")[-2:] == ["pytorch_model.bin", "tokenizer.json"]
    assert chosen("consolidated.safetensors", "params.json") == ["consolidated.safetensors", "params.json"]
    assert chosen("README.md", "fp16/model.safetensors", "fp16/config.json") == [
        "fp16/config.json",
        "fp16/model.safetensors",
    ]


def test_of_several_gguf_files_one_is_named() -> None:
    quants = ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "config.json")
    with pytest.raises(CacheError, match=r"--include '\*Q4_K_M\*\.gguf'"):
        chosen(*quants)
    assert chosen(*quants, include=("*Q4*",)) == ["m-Q4_K_M.gguf"]
    parts = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert chosen(*parts, "mmproj-m.gguf") == [*parts, "mmproj-m.gguf"]


def test_patterns() -> None:
    assert chosen(*HF, "a/b.json", include=("*.json",), exclude=("a/*", "tok*")) == ["config.json", HF[-1]]
    with pytest.raises(CacheError, match=r"no file is left.*--include"):
        chosen("README.md", include=("*.gguf",))
    with pytest.raises(CacheError, match="also a directory"):
        chosen("a", "a/b", include=("*",))
    with pytest.raises(CacheError, match="twice"):
        chosen("a", "a", include=("*",))
