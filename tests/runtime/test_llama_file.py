"""A model that is missing or broken is named in one line, with what is wrong and where."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from aim_runtime.engines.base import ModelLoadError
from aim_runtime.engines.llama_cpp.engine import LlamaCppEngine
from aim_runtime.engines.llama_cpp.file import find_gguf

HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)


def test_the_only_gguf_of_a_directory_is_found(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(HEADER)
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "model.gguf") == tmp_path / "model.gguf"


def test_parts_of_one_model_are_one_model(tmp_path: Path):
    for part in (1, 2):
        (tmp_path / f"big-0000{part}-of-00002.gguf").write_bytes(HEADER)
    assert find_gguf(tmp_path).name == "big-00001-of-00002.gguf"
    (tmp_path / "other.gguf").write_bytes(HEADER)
    with pytest.raises(ModelLoadError, match="holds 3 GGUF files"):
        find_gguf(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no *.gguf file (it holds: nothing)"),
        ({"model.safetensors": b"x"}, "it holds: model.safetensors"),
        ({"a.gguf": HEADER, "b.gguf": HEADER}, "holds 2 GGUF files (a.gguf, b.gguf)"),
        ({"a.gguf": b""}, "a.gguf is empty"),
        ({"a.gguf": b"PK\x03\x04 a zip file of some length"}, "begins with b'PK\\x03\\x04'"),
        ({"a.gguf": b"GGUF\x03\x00"}, "a.gguf is truncated: 6 bytes"),
        ({"a.gguf": struct.pack("<4sIQQ", b"GGUF", 9, 0, 0)}, "GGUF version 9"),
    ],
)
async def test_what_is_no_model_is_named(tmp_path: Path, files: dict[str, bytes], message: str):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        await LlamaCppEngine(tmp_path, served_model_name="m").load()
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_directory_that_is_not_there(tmp_path: Path):
    with pytest.raises(ModelLoadError, match="nowhere does not exist"):
        await LlamaCppEngine(tmp_path / "nowhere", served_model_name="m").load()


@pytest.mark.model
@pytest.mark.parametrize("kept_bytes", [40, 5_000, 4_000_000, 90_000_000])
async def test_a_truncated_model_is_refused(embedded_model: Path, tmp_path: Path, kept_bytes: int):
    path = tmp_path / "cut.gguf"
    with embedded_model.open("rb") as source:
        path.write_bytes(source.read(kept_bytes))
    with pytest.raises(ModelLoadError) as caught:
        await LlamaCppEngine(path, served_model_name="m", threads=1).load()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.model
async def test_more_context_than_trained_is_refused_by_how_much(embedded_model: Path):
    with pytest.raises(ModelLoadError, match=r"max_model_len 9000 is 808 tokens more than .* trained on \(8192"):
        await LlamaCppEngine(embedded_model, served_model_name="m", max_model_len=9000, threads=1).load()
