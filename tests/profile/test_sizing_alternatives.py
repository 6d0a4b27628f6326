"""Alternatives are true: each one, sized again on its own, fits; and the obvious ones are named."""

import pytest

from aim_profile.gpus.catalog import DEPLOYMENTS, by_name, catalog
from aim_profile.models.load import by_id, known_ids
from aim_profile.sizing.alternatives import size_on, size_on_bytes
from aim_profile.sizing.fit import DoesNotFit, Fit, Option, fit, make_request
from aim_profile.units import GIB

MIXTRAL = by_id("mistralai/Mixtral-8x7B-Instruct-v0.1")
LLAMA = by_id("meta-llama/Llama-3.1-8B-Instruct")


def options(answer: Fit | DoesNotFit, **wanted: object) -> list[Option]:
    return [o for o in answer.alternatives if all(getattr(o, key) == value for key, value in wanted.items())]


def test_mixtral_on_a_cpx_partition_names_dpx_truthfully():
    gpu = by_name("MI300X")
    answer = size_on(MIXTRAL, gpu.mode("CPX/NPS4"), gpu, make_request(precision="bf16"))
    assert isinstance(answer, DoesNotFit)
    assert answer.shortfall_gib > 60
    (pair,) = options(answer, kind="tensor-parallel", partition="DPX/NPS2")
    assert (pair.tp, pair.devices, pair.precision, pair.tier) == (2, 2, "bf16", "validated")
    (half,) = options(answer, kind="precision", partition="DPX/NPS2")
    assert (half.tp, half.precision) == (1, "fp8")
    assert options(answer, kind="accelerator", accelerator="MI355X", partition="DPX/NPS2", precision="bf16")
    assert options(answer, kind="partition", partition="SPX/NPS1", precision="bf16")
    assert not options(answer, partition="DPX/NPS2", precision="bf16", tp=1, accelerator="MI300X")


def test_a_bare_24_gib_device_names_dpx_of_the_catalogue():
    answer = size_on_bytes(MIXTRAL, 24 * GIB, make_request(precision="bf16"))
    assert isinstance(answer, DoesNotFit)
    assert any(option.partition == "DPX/NPS2" for option in answer.alternatives)


def test_deepseek_r1_needs_whole_cards_together():
    gpu = by_name("MI300X")
    answer = size_on(by_id("deepseek-ai/DeepSeek-R1"), gpu.mode("SPX"), gpu, make_request())
    (together,) = options(answer, accelerator="MI300X")
    assert (together.kind, together.tp, together.partition) == ("tensor-parallel", 4, "SPX/NPS1")
    assert not options(answer, accelerator="MI210")  # no fp8 there


def test_a_request_that_is_merely_too_long_is_offered_shorter_first():
    gpu = by_name("MI300X")
    answer = size_on(LLAMA, gpu.mode("CPX"), gpu, make_request(precision="bf16", context=32768, concurrency=4))
    first, second = answer.alternatives[:2]
    assert (first.kind, second.kind) == ("context", "concurrency")
    assert first.context == answer.max_context < 32768
    assert second.concurrency == answer.max_concurrency == 1


def test_tensor_parallelism_over_partitions_is_said_to_be_unproven_and_comes_last():
    gpu = by_name("MI300X")
    answer = size_on(MIXTRAL, gpu.mode("CPX/NPS4"), gpu, make_request(precision="bf16"))
    together = [option for option in options(answer, accelerator="MI300X") if option.tp > 1]
    assert {option.partition for option in together} >= {"CPX/NPS4", "DPX/NPS2"}
    for option in together:
        assert option.unproven
        assert option.tier in ("validated", "driver-legal")  # of the mode
        assert option.description.endswith(f"({option.tier}, tensor parallelism unproven)")
    of_this = [option.unproven for option in options(answer, accelerator="MI300X")]
    assert of_this == sorted(of_this)
    whole_cards = options(size_on(by_id("deepseek-ai/DeepSeek-R1"), gpu.mode("SPX"), gpu, make_request()), tp=8)
    assert whole_cards
    assert not any(option.unproven or "unproven" in option.description for option in whole_cards)


def test_an_sr_iov_guest_is_never_told_to_repartition():
    gpu = by_name("MI300X")
    for mode in ("SPX", "CPX/NPS4"):
        answer = size_on(by_id("deepseek-ai/DeepSeek-R1"), gpu.mode(mode, "sr-iov"), gpu, make_request(context=512))
        found = {option.partition for option in answer.alternatives if option.accelerator == "MI300X"}
        assert found <= {gpu.mode(mode, "sr-iov").label}


def test_a_passthrough_vm_is_never_told_to_repartition():
    gpu = by_name("MI300X")
    answer = size_on(by_id("deepseek-ai/DeepSeek-R1"), gpu.mode("SPX", "passthrough"), gpu, make_request())
    assert {option.partition for option in answer.alternatives} == {"SPX/NPS1"}


def test_a_fit_needs_no_alternatives():
    gpu = by_name("MI300X")
    assert size_on(LLAMA, gpu.mode("SPX"), gpu, make_request()).alternatives == ()


@pytest.mark.parametrize("model_id", [m for m in known_ids() if by_id(m).sizable][::3])
@pytest.mark.parametrize("name", ["MI210", "MI300A", "MI300X", "MI355X"])
def test_every_alternative_fits_when_sized_on_its_own(model_id: str, name: str):
    model, gpu = by_id(model_id), by_name(name)
    mode = gpu.modes()[-1]
    request = make_request(context=min(32768, model.max_positions or 32768), concurrency=8)
    answer = size_on(model, mode, gpu, request)
    assert answer.fits or answer.alternatives
    for option in answer.alternatives:
        assert option.accelerator is not None
        assert option.partition is not None
        place = catalog()[option.accelerator].mode(option.partition)
        assert place.tier == option.tier != "unsupported"
        assert option.devices == option.tp
        changed = request.model_dump() | option.model_dump(include={"precision", "context", "concurrency", "tp"})
        again = fit(model, place.memory_bytes, **changed)
        assert again.fits
        assert again.headroom_gib == pytest.approx(option.headroom_gib, abs=0.0011)
        if place.partitions > 1:
            assert option.devices <= place.partitions


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_the_same_question_gets_the_same_answer(deployment: str):
    gpu = by_name("MI300X")
    mode = gpu.mode("SPX", deployment)  # type: ignore[arg-type]
    request = make_request(precision="bf16", context=32768, concurrency=64)
    assert size_on(MIXTRAL, mode, gpu, request) == size_on(MIXTRAL, mode, gpu, request)
