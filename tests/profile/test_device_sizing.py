"""One device of a node, flat, and whether a model fits it: GPUs and CPU sets alike."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from aim_profile.errors import ModelError, SizingError
from aim_profile.models.load import by_id, load_model
from aim_profile.nodes.devices import Device, devices_of
from aim_profile.nodes.facts import Node
from aim_profile.nodes.read import emulate
from aim_profile.sizing.alternatives import size_on
from aim_profile.sizing.fit import DoesNotFit, Fit, make_request
from aim_profile.sizing.on_device import size_on_device
from aim_profile.units import GIB, MIB

LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


def cpu_set(memory_mib: int | None) -> Device:
    return Device("cpu", 0, 0, "cpu", memory_mib, 1, cpus=(0,))


def test_the_devices_of_a_partitioned_node_in_order():
    devices = devices_of(emulate("MI300X", 2, "CPX/NPS4"))
    assert [(d.card, d.partition) for d in devices] == [(card, part) for card in range(2) for part in range(8)]
    one = devices[11]
    assert (one.kind, one.product, one.memory_mib, one.compute_units, one.render_minor) == (
        *("gpu", "MI300X", 24574, 38, None),
    )
    assert (one.compute_partition, one.memory_partition, one.alloc_mode, one.cpus) == ("CPX", "NPS4", "CAPPING", ())
    assert one.mode is not None
    assert one.label == "card 1 partition 3 (MI300X CPX/NPS4)"


def test_a_device_is_sized_by_what_it_reports_itself():
    """The last partition in NPS4 is 16 MiB smaller: its sibling's size does not speak for it."""
    node = emulate("MI300X", 1, "CPX/NPS4")
    (card,) = node.cards
    smaller = card.partitions[7].model_copy(update={"memory_mib": 24000})
    node = node.model_copy(update={"cards": (card.model_copy(update={"partitions": (*card.partitions[:7], smaller)}),)})
    answers = [size_on_device(by_id(LLAMA_8B), d, context=32768) for d in devices_of(node)]
    assert [type(answer) for answer in answers] == [Fit] * 7 + [DoesNotFit]
    assert answers[7].budget_gib == pytest.approx(24000 * 0.9 / 1024, abs=0.001)


def test_on_a_gpu_the_answer_is_the_one_that_fit_gives():
    (device,) = devices_of(emulate("MI210", 1, "SPX"))
    assert device.mode is not None
    asked = size_on_device(by_id("Qwen/Qwen3-32B"), device, context=4096, concurrency=2)
    accelerator = emulate("MI210", 1, "SPX").cards[0].accelerator
    assert accelerator is not None
    request = make_request(context=4096, concurrency=2)
    assert asked == size_on(by_id("Qwen/Qwen3-32B"), device.mode, accelerator, request)
    assert asked.shortfall_gib > 0
    assert asked.alternatives


def test_in_allocation_mode_all_a_device_counts_with_its_share():
    node = emulate("MI300X", 1, "CPX/NPS1")
    card = node.cards[0]
    parts = tuple(part.model_copy(update={"memory_mib": 196592}) for part in card.partitions)
    shared = card.model_copy(update={"alloc_mode": "ALL", "partitions": parts})
    capped = size_on_device(by_id(LLAMA_8B), devices_of(node)[0])
    assert size_on_device(by_id(LLAMA_8B), devices_of(Node(cards=(shared,)))[0]).budget_gib == capped.budget_gib


def test_a_memory_limit_bounds_the_budget_and_may_not_exceed_the_device():
    device = devices_of(emulate("MI300X", 1, "CPX/NPS4"))[0]
    limited = size_on_device(by_id(LLAMA_8B), device, memory_limit_bytes=20 * GIB)
    assert limited.budget_gib == 20
    with pytest.raises(
        SizingError, match=r"memory limit of 40.0 GiB: card 0 partition 0 .* has 23\.998 GiB"
    ) as refused:
        size_on_device(by_id(LLAMA_8B), device, memory_limit_bytes=40 * GIB)
    assert refused.value.field == "memory_limit"
    with pytest.raises(SizingError, match="memory limit of 0 bytes; say how much"):
        size_on_device(by_id(LLAMA_8B), device, memory_limit_bytes=0)


def test_a_gguf_on_a_cpu_set_counts_what_llama_cpp_takes(embedded_model: Path):
    """92.1 MiB of weights, 45 MiB of cache and a mask of 2 MiB for 2048 tokens; nothing of vLLM's 2.3 GiB."""
    answer = size_on_device(load_model(embedded_model), cpu_set(1024), context=2048)
    assert isinstance(answer, Fit)
    assert (answer.engine, answer.precision) == ("llama_cpp", "q4_1")
    assert answer.weights_gib * 1024 == pytest.approx(92.1, abs=0.5)
    assert answer.kv_gib * 1024 == pytest.approx(47, abs=0.5)
    assert 200 < answer.overhead_gib * 1024 < 300


def test_a_cpu_set_that_is_too_small_says_by_how_much_and_what_would_do(embedded_model: Path):
    model = load_model(embedded_model)
    answer = size_on_device(model, cpu_set(512), context=2048, concurrency=4)
    assert isinstance(answer, DoesNotFit)
    assert answer.shortfall_gib > 0
    assert [option.kind for option in answer.alternatives] == ["concurrency", "memory"]
    enough = re.search(r"in (\d+) MiB of memory", answer.alternatives[-1].description)
    assert enough is not None
    assert size_on_device(model, cpu_set(int(enough[1])), context=2048, concurrency=4).fits
    assert not size_on_device(model, cpu_set(int(enough[1]) - 1), context=2048, concurrency=4).fits
    fewer = answer.alternatives[0]
    assert size_on_device(model, cpu_set(512), context=2048, concurrency=fewer.concurrency).fits


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"tp": 2}, "tp"),
        ({"kv_dtype": "fp8"}, "kv_dtype"),
        ({"precision": "fp8"}, "precision"),
        ({"context": 9000}, "context"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused_by_name(embedded_model: Path, asked: dict[str, object], field: str):
    with pytest.raises(SizingError) as refused:
        size_on_device(load_model(embedded_model), cpu_set(4096), **asked)  # type: ignore[arg-type]
    assert refused.value.field == field
    assert refused.value.remedy


def test_the_bits_of_a_gguf_may_be_named_in_the_words_of_other_formats(embedded_model: Path):
    answer = size_on_device(load_model(embedded_model), cpu_set(4096), precision="int4")
    assert (answer.fits, answer.precision) == (True, "q4_1")


@pytest.mark.parametrize(("memory", "says"), [(None, "not readable here"), (0, "memory is 0")])
def test_a_device_without_known_memory_is_refused(memory: int | None, says: str):
    with pytest.raises(SizingError, match=says):
        size_on_device(by_id(LLAMA_8B), cpu_set(memory))


def test_a_directory_that_holds_one_gguf_is_that_model(embedded_model: Path, tmp_path: Path):
    (tmp_path / "a.gguf").symlink_to(embedded_model)
    assert load_model(tmp_path).native_precision == "q4_1"
    (tmp_path / "b.gguf").symlink_to(embedded_model)
    with pytest.raises(ModelError, match=r"holds 2 GGUF models \(a\.gguf, b\.gguf\); name one of the files"):
        load_model(tmp_path)


_LOADED = """
import asyncio, sys
from pathlib import Path
from aim_runtime.engines import registry
from aim_runtime.engines.base import EngineSpec, RequestContext

async def main():
    engine = registry.create(EngineSpec("llama_cpp", Path(sys.argv[1]), "m", 2048, 2, {"threads": 1}))
    await engine.load()
    chat = engine.operations["chat/completions"]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi " * 600}], "max_tokens": 2}
    await chat(body, RequestContext("0"))
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak KiB", peak.split()[1])
    await engine.close()

asyncio.run(main())
"""


def test_the_sizing_of_a_gguf_holds_for_the_engine_that_serves_it(embedded_model: Path):
    """Its resident memory stays below what is counted, and not so far below that machines stand empty."""
    run = subprocess.run(
        [sys.executable, "-c", _LOADED, str(embedded_model)], capture_output=True, text=True, timeout=240, check=True
    )
    found = re.search(r"peak KiB (\d+)", run.stdout)
    assert found is not None
    answer = size_on_device(load_model(embedded_model), cpu_set(4096), context=2048, concurrency=2)
    counted_mib = (answer.weights_gib + answer.kv_gib + answer.overhead_gib) * 1024
    assert counted_mib * 0.5 < int(found[1]) * 1024 / MIB < counted_mib
