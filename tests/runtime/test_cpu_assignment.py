"""A machine without a GPU is a node of CPU sets: the same sum guards it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from aim_profile.nodes.emulated import emulate, export_node
from aim_profile.units import GIB, MIB, gib, parse_memory
from aim_runtime.assignment import Assignment, Refused
from aim_runtime.choose import spec_of
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import prepare, prepare_all
from model_directory import write_model
from served import Served

#: SmolLM2-135M Q4_1: 92 MiB of weights, 8192 positions, 23040 bytes of cache a token.
SEQUENCE_BYTES = 8192 * 23040


def load(*argv: str) -> RuntimeSettings:
    return RuntimeSettings.load(argv, {}, prog="aim-runtime", description="")


@pytest.fixture
def four_sets(tmp_path: Path) -> Path:
    """Eight cores and 8 GiB in four equal partitions."""
    file = tmp_path / "cpu.yaml"
    file.write_text("version: 1\nkind: cpu\ncores: 8\nmemory: 8GiB\npartitions: 4\n")
    return file


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The same with 8 GiB in each."""
    file = tmp_path / "large.yaml"
    file.write_text("version: 1\nkind: cpu\ncores: 8\nmemory: 32GiB\npartitions: 4\n")
    return file


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One core and little memory."""
    file = tmp_path / "small.yaml"
    file.write_text("version: 1\nkind: cpu\npartitions:\n- {cpus: [0], memory: 300MiB}\n")
    return file


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """0.2e9 parameters in bf16 with 30720 bytes of cache a token, for vLLM."""
    shape = {"hidden_size": 640, "num_attention_heads": 10, "num_key_value_heads": 4, "num_hidden_layers": 60}
    return write_model(tmp_path / "dense", 200 * 2**20, intermediate_size=1024, vocab_size=1024, **shape)


def assign(model: Path, node: Path, *argv: str) -> Assignment:
    return prepare(load("--model_dir", str(model), "--node", str(node), *argv), {})


def refusal(model: Path, node: Path, *argv: str) -> Refused:
    with pytest.raises(Refused) as caught:
        assign(model, node, *argv)
    return caught.value


@pytest.mark.model
def test_a_gguf_gets_a_cpu_set_its_threads_and_its_cache(embedded_model: Path, four_sets: Path) -> None:
    found = assign(embedded_model, four_sets, "--partition_id", "2")
    (device,) = found.devices
    assert (device.card, device.partition, device.memory_mib, device.compute_units) == (0, 2, 2048, 2)
    assert (found.cpus, found.memory_bytes) == ((4, 5), 2 * GIB)
    assert found.env == {"OMP_NUM_THREADS": "2"}
    flags = found.engine_args
    assert (flags["threads"], flags["max-model-len"], flags["max-concurrency"]) == (2, 8192, 8)
    assert flags["kv-cache-memory-bytes"] == 512 * MIB
    assert found.fit["fits"] is True
    assert found.evidence.mode == "CPU"


@pytest.mark.model
def test_the_embedded_engine_gets_exactly_that(embedded_model: Path, four_sets: Path) -> None:
    settings = load("--model_dir", str(embedded_model), "--node", str(four_sets), "--model_name", "m", "--threads", "1")
    spec = spec_of(settings, prepare(settings, {}))
    assert (spec.engine, spec.served_model_name, spec.max_model_len, spec.max_concurrency) == (
        "llama_cpp",
        "m",
        8192,
        8,
    )
    assert spec.options == {"threads": 1, "kv_cache_memory_bytes": 512 * MIB}


@pytest.mark.model
def test_what_is_asked_for_is_held_as_far_as_there_is_room(embedded_model: Path, four_sets: Path) -> None:
    asked = ["--max_model_len", "8192", "--max_concurrency"]
    two = assign(embedded_model, four_sets, *asked, "2")
    assert two.engine_args["kv-cache-memory-bytes"] == 2 * SEQUENCE_BYTES
    many = assign(embedded_model, four_sets, *asked, "64")
    pool = many.engine_args["kv-cache-memory-bytes"]
    assert isinstance(pool, int)
    assert 6 * SEQUENCE_BYTES < pool < 2 * GIB
    assert any(note.endswith("of 64 sequences of full length fit at once, others wait") for note in many.evidence.notes)


@pytest.mark.model
def test_a_smaller_cache_where_the_usual_one_has_no_room(embedded_model: Path, tmp_path: Path) -> None:
    node = tmp_path / "tight.yaml"
    node.write_text("version: 1\nkind: cpu\npartitions:\n- {cpus: [0], memory: 700MiB}\n")
    found = assign(embedded_model, node)
    pool = found.engine_args["kv-cache-memory-bytes"]
    assert isinstance(pool, int)
    assert SEQUENCE_BYTES <= pool < 512 * MIB


@pytest.mark.model
def test_what_does_not_fit_is_refused_with_the_shortfall(embedded_model: Path, small: Path) -> None:
    refused = refusal(embedded_model, small)
    assert refused.shortfall_gib
    assert 0.1 < refused.shortfall_gib < 0.5
    assert f"short by {refused.shortfall_gib} GiB" in str(refused)
    assert "MiB of memory" in refused.remedy


@pytest.mark.model
@pytest.mark.parametrize(
    ("argv", "field", "says"),
    [
        (["--partition_id", "4"], "partition-id", "free here are 0, 1, 2, 3"),
        (["--max_concurrency", "257"], "max-concurrency", "llama.cpp computes at most 256 sequences at once"),
        (["--partition_count", "2"], "partition-count", "a model runs on one CPU set"),
        (["--memory_limit", "3GiB"], "memory-limit", "3.0 GiB"),
        (["--max_model_len", "9000"], "max-model-len", "8192"),
        (["--precision", "bf16"], "precision", "the file holds q4_1"),
        (["--compute_partition", "CPX"], "compute-partition", "no AMD GPU is here"),
        (["--gpu_sharing", "enabled"], "gpu-sharing", "no AMD GPU is here"),
        (["--profile", "vllm-mi300x-bf16-tp1-latency"], "compute-partition", "no AMD GPU is here"),
    ],
)
def test_refusals(embedded_model: Path, four_sets: Path, argv: list[str], field: str, says: str) -> None:
    refused = refusal(embedded_model, four_sets, *argv)
    assert refused.field == field
    assert says in str(refused)
    assert refused.remedy


@pytest.mark.model
def test_beside_gpus_the_embedded_engine_takes_the_processors(embedded_model: Path, tmp_path: Path) -> None:
    node = tmp_path / "gpus.yaml"
    node.write_text(export_node(emulate("MI300X", cards=1)))
    refused = refusal(embedded_model, node, "--compute_partition", "SPX")
    assert "the llama_cpp engine computes on the CPU" in str(refused)


def test_vllm_s_cpu_build_is_told_its_cache_and_its_cores(dense: Path, large: Path) -> None:
    found = assign(dense, large, "--partition_id", "3", "--max_model_len", "2048", "--max_concurrency", "4")
    flags = found.engine_args
    assert (flags["max-model-len"], flags["max-num-seqs"]) == (2048, 4)
    assert flags["kv-cache-memory-bytes"] == 4 * 2048 * found.fit["kv_bytes_per_token"]
    assert found.env == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "6,7"}
    assert (found.cpus, found.memory_bytes) == ((6, 7), 8 * GIB)


def test_32_bits_take_twice_the_memory(dense: Path, large: Path) -> None:
    half = assign(dense, large, "--max_model_len", "2048")
    full = assign(dense, large, "--max_model_len", "2048", "--engine_args=--dtype float32")
    for figure in ("weights_gib", "kv_bytes_per_token", "kv_gib"):
        assert full.fit[figure] == pytest.approx(2 * float(str(half.fit[figure])), rel=0.01)
    assert assign(dense, large, "--precision", "fp32", "--max_model_len", "2048").engine_args["dtype"] == "float32"


def test_a_cache_given_by_name_must_fit(dense: Path, large: Path) -> None:
    kept = assign(dense, large, "--engine_args", '{"kv-cache-memory-bytes": "1G"}')
    assert kept.engine_args["kv-cache-memory-bytes"] == GIB
    refused = refusal(dense, large, "--engine_args", '{"kv-cache-memory-bytes": "7G"}')
    assert refused.field == "kv-cache-memory-bytes"
    assert refused.shortfall_gib
    assert "'much'" in str(refusal(dense, large, "--engine_args", '{"kv-cache-memory-bytes": "much"}'))


def test_what_cannot_be_sized_starts_unless_its_file_alone_is_too_large(tmp_path: Path, small: Path) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(b"GGUF")
    found = assign(odd, small)
    assert found.fit == {}
    assert any(note.startswith("not sized: ") for note in found.evidence.notes)
    assert refusal(odd, small, "--memory_limit", "60MiB").shortfall_gib == 0.041  # of 96 MiB, not of 4 bytes
    with odd.open("ab") as file:
        file.truncate(300 * MIB)
    assert "short by" in str(refusal(odd, small))


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "aim_runtime", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.model
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(embedded_model: Path, small: Path) -> None:
    done = run("--model_dir", str(embedded_model), "--node", str(small), "--http_port", "0", "--grpc_port", "0")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert lines[-1].startswith("error: ")
    assert "does not fit" in lines[-1]
    assert not any("listening" in line for line in lines)
    assert "| llama_cpp" not in done.stderr


@pytest.mark.model
def test_processors_that_are_not_here_are_refused(embedded_model: Path, tmp_path: Path) -> None:
    node = tmp_path / "elsewhere.yaml"
    absent = max(os.sched_getaffinity(0)) + 1000
    node.write_text(f"version: 1\nkind: cpu\npartitions:\n- {{cpus: [{absent}], memory: 2GiB}}\n")
    done = run("--model_dir", str(embedded_model), "--node", str(node), "--http_port", "0", "--grpc_port", "0")
    assert done.returncode == 1
    assert f"CPU {absent} is none that this process may use" in done.stderr.splitlines()[-1]


@pytest.mark.model
def test_gpus_of_a_file_are_not_served_on(tmp_path: Path) -> None:
    node = tmp_path / "gpus.yaml"
    node.write_text(export_node(emulate("MI300X", cards=1)))
    done = run("--model_dir", str(write_model(tmp_path / "m", 2**20)), "--node", str(node))
    assert (done.returncode, "describes GPUs" in done.stderr.splitlines()[-1]) == (1, True)


@pytest.mark.model
def test_a_cpu_set_is_kept_to(embedded_model: Path, tmp_path: Path) -> None:
    """The engine's process has one core and a limit on its memory, and answers."""
    node = tmp_path / "one.yaml"
    core = min(os.sched_getaffinity(0))
    node.write_text(f"version: 1\nkind: cpu\npartitions:\n- {{cpus: [{core}], memory: 1GiB}}\n")
    flags = ["--model_name", "m", "--model_dir", str(embedded_model), "--node", str(node), "--max_model_len", "512"]
    with Served(["-m", "aim_runtime", *flags]) as server:
        (child,) = psutil.Process(server.process.pid).children()
        assert child.cpu_affinity() == [core]
        assert child.rlimit(psutil.RLIMIT_DATA)[0] == GIB
        body = {"model": "m", "prompt": "The sky is", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.model
def test_more_models_than_cpu_sets(embedded_model: Path) -> None:
    models = [load("--model_dir", str(embedded_model), "--model_name", name, "--card", "0") for name in ("a", "b")]
    models = [model.model_copy(update={"card": None}) for model in models]
    with pytest.raises(Refused) as caught:
        prepare_all(models, None)
    assert caught.value.field == "devices"
    assert str(caught.value).startswith("model b: no CPU set is left for it: the only one here is taken; ")


@pytest.mark.parametrize("limit", ["300MiB", "1MiB"])
def test_a_memory_limit_that_is_too_small_says_which_would_do(
    embedded_model: Path, four_sets: Path, limit: str
) -> None:
    flags = ["--model_dir", str(embedded_model), "--node", str(four_sets), "--memory_limit", limit]
    with pytest.raises(Refused) as caught:
        prepare(load(*flags))
    assert f"at 8192 tokens in {gib(parse_memory(limit))} GiB of memory: short by" in caught.value.problem
    (option,) = [option for option in caught.value.would_fit if "memory" in option]
    assert option == "q4_1 with a memory limit of 544 MiB, 0.531 GiB"
    assert prepare(load(*flags[:-1], "544MiB")).fit["fits"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 5000, "File name too long"),
        ("folder", "No such file or directory"),
        ("a\nb", "no such file or directory"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.gguf").symlink_to("/nothing")
    log = tmp_path / "log"
    command = [sys.executable, "-m", "aim_runtime", "--dry_run", "--model_dir", str(tmp_path / name)]
    done = subprocess.run([*command, "--termination_log", str(log)], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith("error: "), says in line, len(line) < 1000) == (1, True, True, True)
    assert log.read_text() == line.removeprefix("error: ")


@pytest.mark.parametrize("flag", ["--kv-cache-memory-bytes", "--max-model-len", "--max-num-seqs"])
def test_numbers_that_no_engine_takes(dense: Path, large: Path, flag: str) -> None:
    flags = ["--model_dir", str(dense), "--node", str(large), "--engine", "vllm", "--engine_args"]
    with pytest.raises(Refused) as caught:
        prepare(load(*flags, f"{flag} {'9' * 5000}"))
    assert caught.value.field == flag.removeprefix("--")


def test_this_machine_as_it_is(embedded_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aim_runtime", "--dry_run", "-o", "json", "--model_dir", str(embedded_model)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = json.loads(done.stdout)
    assert found["cpus"] is None  # the whole machine is not pinned to itself
    assert found["memory_bytes"] is None
    assert found["devices"][0]["memory_mib"] > 0
