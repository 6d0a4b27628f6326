"""The memory formulas against published sizes, the sourced KV table, and properties that must hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_profile.errors import SizingError, UnknownModelError
from aim_profile.gpus.catalog import by_name
from aim_profile.models.facts import Attention, Experts, Mla, ModelFacts, Shape
from aim_profile.models.load import by_id, known_ids
from aim_profile.models.parameters import count_parameters
from aim_profile.sizing.fit import DoesNotFit, Fit, Request, demand, fit, lora_bytes, make_request, weight_bytes
from aim_profile.sizing.kv_cache import KV_BLOCK_TOKENS, kv_bytes_per_sequence, kv_bytes_per_token
from aim_profile.units import GIB, MIB

# id: (KV bytes per token at 16 bits, GiB of KV at 8192 and at 32768 tokens): sourced, not computed here.
KV = {
    "CohereForAI/aya-expanse-8b": (131072, 1.0, 4.0),
    "deepseek-ai/DeepSeek-R1-0528": (70272, 0.536, 2.145),
    "deepseek-ai/DeepSeek-R1": (70272, 0.536, 2.145),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (131072, 1.0, 4.0),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": (327680, 2.5, 10.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (28672, 0.219, 0.875),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (57344, 0.438, 1.75),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": (196608, 1.5, 6.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": (262144, 2.0, 8.0),
    "deepseek-ai/DeepSeek-R1-Zero": (70272, 0.536, 2.145),
    "deepseek-ai/DeepSeek-V3": (70272, 0.536, 2.145),
    "deepseek-ai/DeepSeek-V3-0324": (70272, 0.536, 2.145),
    "google/gemma-3-1b-it": (26624, 0.042, 0.136),
    "google/gemma-3-4b-it": (139264, 0.27, 0.738),
    "google/gemma-3-12b-it": (393216, 0.812, 2.312),
    "google/gemma-3-27b-it": (507904, 1.031, 2.906),
    "meta-llama/Llama-3.1-8B-Instruct": (131072, 1.0, 4.0),
    "meta-llama/Llama-3.2-1B-Instruct": (32768, 0.25, 1.0),
    "meta-llama/Llama-3.2-3B-Instruct": (114688, 0.875, 3.5),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": (131072, 1.0, 4.0),
    "meta-llama/Llama-3.3-70B-Instruct": (327680, 2.5, 10.0),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (196608, 1.5, 2.625),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (163840, 1.25, 5.0),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (131072, 1.0, 4.0),
    "Qwen/Qwen2.5-0.5B-Instruct": (12288, 0.094, 0.375),
    "Qwen/Qwen2.5-1.5B-Instruct": (28672, 0.219, 0.875),
    "Qwen/Qwen2.5-3B-Instruct": (36864, 0.281, 1.125),
    "Qwen/Qwen3-4B": (147456, 1.125, 4.5),
    "Qwen/Qwen3-4B-Instruct-2507": (147456, 1.125, 4.5),
    "Qwen/Qwen3-8B": (147456, 1.125, 4.5),
    "Qwen/Qwen3-14B": (163840, 1.25, 5.0),
    "Qwen/Qwen3-30B-A3B": (98304, 0.75, 3.0),
    "Qwen/Qwen3-32B": (262144, 2.0, 8.0),
    "Qwen/Qwen3-235B-A22B": (192512, 1.469, 5.875),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (22528, 0.172, 0.688),
    "unsloth/Llama-3.2-11B-Vision-Instruct": (131072, 1.0, 4.0),
}
# GiB of the files on the hub, where a source gives them.
FILES_GIB = {
    "deepseek-ai/DeepSeek-R1-0528": 641.3,
    "deepseek-ai/DeepSeek-V3-0324": 641.3,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 14.96,
    "google/gemma-3-4b-it": 8.01,
    "meta-llama/Llama-3.1-8B-Instruct": 14.96,
    "meta-llama/Llama-3.3-70B-Instruct": 131.42,
}
# Parameters in billions from independent listings.
PARAMETERS_B = {
    "deepseek-ai/DeepSeek-R1": 671.026,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": 108.67,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.703,
    "Qwen/Qwen3-235B-A22B": 235.094,
    "Qwen/Qwen3-30B-A3B": 30.532,
    "Qwen/Qwen2.5-0.5B-Instruct": 0.494,
    "google/gemma-3-1b-it": 1.0,
    "google/gemma-3-12b-it": 12.183,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 23.992,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10.675,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1.1,
}
LLAMA = by_id("meta-llama/Llama-3.1-8B-Instruct")
SIZED = [model_id for model_id in known_ids() if by_id(model_id).sizable]


@pytest.mark.parametrize("model_id", sorted(KV))
def test_kv_cache_per_token_and_sequence(model_id: str):
    per_token, gib_8k, gib_32k = KV[model_id]
    model = by_id(model_id)
    assert kv_bytes_per_token(model) == per_token
    assert kv_bytes_per_sequence(model, 8192) / GIB == pytest.approx(gib_8k, abs=0.0006)
    assert kv_bytes_per_sequence(model, 32768) / GIB == pytest.approx(gib_32k, abs=0.0006)


@pytest.mark.parametrize("model_id", sorted(FILES_GIB))
def test_weights_are_within_one_percent_of_the_published_files(model_id: str):
    assert weight_bytes(by_id(model_id)) / GIB == pytest.approx(FILES_GIB[model_id], rel=0.01)


def test_computed_weights_match_published_files_without_knowing_them():
    for model_id in ("meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it", "meta-llama/Llama-3.3-70B-Instruct"):
        assert by_id(model_id).file_bytes is None
    assert weight_bytes(by_id("deepseek-ai/DeepSeek-R1"), "bf16") / GIB == pytest.approx(1249.88, abs=0.01)


@pytest.mark.parametrize("model_id", sorted(PARAMETERS_B))
def test_parameters_counted_from_dimensions(model_id: str):
    total = by_id(model_id).total_params
    assert total is not None
    assert total / 1e9 == pytest.approx(PARAMETERS_B[model_id], abs=0.0011)


def test_the_catalogue_sizes_all_but_three_models_and_says_what_those_miss():
    unsized = {model_id: by_id(model_id).status for model_id in known_ids() if model_id not in SIZED}
    assert set(unsized) == {
        "CohereForAI/aya-expanse-32b",
        "mistralai/Mistral-Large-Instruct-2407",
        "OdiaGenAI-LLM/qwen_1.5_odia_7b",
    }
    assert all(status.startswith("known, not sized: ") for status in unsized.values())
    with pytest.raises(SizingError, match="known, not sized"):
        fit(by_id("mistralai/Mistral-Large-Instruct-2407"), 192 * GIB)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("google/gemma-3-4B", "google/gemma-3-4b-it"),
        ("CohereForAI/aya-expanse-8B", "CohereForAI/aya-expanse-8b"),
        ("deepseek-ai/Distill-Llama-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
        ("meta-llama/Llama-3.2-11B-Instruct", "meta-llama/Llama-3.2-11B-Vision-Instruct"),
        ("Qwen/Qwen3-8B-Instruct", "Qwen/Qwen3-8B"),
        ("mistralai/Mistral-Large", "mistralai/Mistral-Large-Instruct-2407"),
    ],
)
def test_an_id_that_does_not_exist_is_refused_with_the_right_one(wrong: str, right: str):
    with pytest.raises(UnknownModelError) as refused:
        by_id(wrong)
    assert "no such repository" in str(refused.value)
    assert f"the real id is {right}" in str(refused.value)
    assert by_id(right).id == right


def test_a_model_that_never_was_has_no_substitute():
    with pytest.raises(UnknownModelError, match="11B and 90B only"):
        by_id("unsloth/Llama-3.2-30B-Vision")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8b", "Llama-3.1-8B-Instruct", "", "meta-llama/llama-3.1-8b-instruct"])
def test_ids_are_exact(name: str):
    with pytest.raises(UnknownModelError, match="not in the catalogue"):
        by_id(name)


@pytest.mark.parametrize(
    ("precision", "gib"), [("bf16", 14.96), ("fp16", 14.96), ("fp8", 8.46), ("int8", 8.46), ("int4", 5.40)]
)
def test_quantisation_shrinks_linear_layers_only(precision: str, gib: float):
    assert weight_bytes(LLAMA, precision) / GIB == pytest.approx(gib, abs=0.005)  # type: ignore[arg-type]


def test_llama_8b_fits_a_cpx_partition_once_at_32k():
    device = by_name("MI300X").mode("CPX/NPS4").memory_bytes
    answer = fit(LLAMA, device, precision="bf16", context=32768)
    assert isinstance(answer, Fit)
    assert (answer.max_concurrency, answer.kv_bytes_per_token, answer.kv_gib) == (1, 131072, 4.0)
    assert answer.weights_gib == 14.958
    assert answer.budget_gib == 21.598
    assert answer.overhead_gib == pytest.approx(2.3 + 0.02 * 14.958, abs=0.001)
    left = answer.budget_gib - answer.weights_gib - answer.overhead_gib - answer.kv_gib
    assert answer.headroom_gib == pytest.approx(left, abs=0.002)
    assert answer.max_context >= 32768


def test_deepseek_r1_on_one_card_says_by_how_much():
    answer = fit(by_id("deepseek-ai/DeepSeek-R1"), by_name("MI300X").hbm_mib * MIB)
    assert isinstance(answer, DoesNotFit)
    assert answer.shortfall_gib == pytest.approx(641.3 * 1.02 + 2.3 + 0.536 - 172.786, abs=0.01)
    assert (answer.max_concurrency, answer.max_context) == (0, 0)


# "GiB left for KV" of a model at a precision on a mode, utilization 0.90: worked out by hand elsewhere.
@pytest.mark.parametrize(
    ("model_id", "precision", "gpu", "mode", "room_gib"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "bf16", "MI355X", "CPX/NPS2", 15),
        ("meta-llama/Llama-3.1-8B-Instruct", "fp8", "MI300X", "CPX/NPS4", 11),
        ("Qwen/Qwen3-32B", "fp8", "MI300X", "QPX/NPS1", 8),
        ("Qwen/Qwen3-32B", "int4", "MI300X", "CPX/NPS4", 1),
        ("meta-llama/Llama-3.3-70B-Instruct", "bf16", "MI300X", "SPX/NPS1", 36),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "bf16", "MI355X", "DPX/NPS2", 39),
        ("google/gemma-3-27b-it", "bf16", "MI355X", "QPX/NPS2", 10),
    ],
)
def test_room_for_the_cache(model_id: str, precision: str, gpu: str, mode: str, room_gib: float):
    need = demand(by_id(model_id), make_request(precision=precision))
    room = int(by_name(gpu).mode(mode).memory_bytes * 0.9) - need.fixed
    assert room / GIB == pytest.approx(room_gib, abs=1.0)


def test_tensor_parallel_shards_weights_and_heads_down_to_one_copy():
    assert kv_bytes_per_token(LLAMA, tp=8) == 131072 // 8
    assert kv_bytes_per_token(LLAMA, tp=32) == 131072 // 8
    deepseek = by_id("deepseek-ai/DeepSeek-R1")
    assert kv_bytes_per_token(deepseek, tp=8) == 70272
    assert demand(LLAMA, make_request(tp=8)).weights == -(-weight_bytes(LLAMA) // 8)


@pytest.mark.parametrize("tp", [3, 5, 12, 64])
def test_a_tensor_parallel_that_does_not_divide_is_refused(tp: int):
    with pytest.raises(SizingError, match=f"tensor parallel {tp} does not divide 32 heads"):
        fit(LLAMA, 24 * GIB, tp=tp)


def test_fp8_cache_halves_and_blocks_round_up():
    assert kv_bytes_per_token(LLAMA, "fp8") == 65536
    assert kv_bytes_per_sequence(LLAMA, 1) == 131072 * KV_BLOCK_TOKENS
    assert kv_bytes_per_sequence(LLAMA, 17) == 131072 * 32


def test_cross_attention_layers_hold_the_images_tokens_not_the_texts():
    vision = by_id("meta-llama/Llama-3.2-11B-Vision-Instruct")
    text_only = kv_bytes_per_sequence(vision, 8192)
    with_image = kv_bytes_per_sequence(vision, 8192, encoder_tokens=6400)
    assert text_only == 32 * 4096 * 8192
    assert with_image - text_only == 8 * 4096 * 6400


def vllm_kv_bytes(group: Attention, context: int, step: int, block_bytes: int) -> int:
    """max_memory_usage_bytes of vLLM's KV cache specs, one layer (vllm/v1/kv_cache_interface.py), spelled as there."""
    cdiv = lambda tokens: -(-tokens // KV_BLOCK_TOKENS)  # noqa: E731
    if group.kind == "full":
        return cdiv(context) * block_bytes
    assert group.window is not None
    if group.kind == "chunked":
        return cdiv(min(group.window + step, context)) * block_bytes
    return (cdiv(min(group.window - 1 + step, context)) + 1) * block_bytes


@pytest.mark.parametrize(
    ("model_id", "step", "gib"),
    [
        ("google/gemma-3-27b-it", 2048, 3.725),
        ("google/gemma-3-27b-it", 8192, 6.163),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 2048, 2.906),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 8192, 3.75),
    ],
)
def test_windowed_layers_hold_the_step_beside_their_window(model_id: str, step: int, gib: float):
    model = by_id(model_id)
    assert model.shape is not None
    answer = fit(model, 288 * GIB, precision="int4", context=32768, max_num_batched_tokens=step)
    assert (answer.kv_gib, answer.max_num_batched_tokens) == (gib, step)
    per_layer = kv_bytes_per_token(model) // model.shape.layers * KV_BLOCK_TOKENS
    told = sum(group.layers * vllm_kv_bytes(group, 32768, step, per_layer) for group in model.shape.attention)
    assert demand(model, make_request(context=32768, max_num_batched_tokens=step)).kv_per_sequence == told


@pytest.mark.parametrize(("step", "short_gib"), [(2048, 0.788), (8192, 3.226)])
def test_gemma_27b_int4_at_32k_does_not_fit_a_cpx_partition(step: int, short_gib: float):
    device = by_name("MI300X").mode("CPX/NPS4").memory_bytes
    gemma = by_id("google/gemma-3-27b-it")
    answer = fit(gemma, device, precision="int4", context=32768, max_num_batched_tokens=step)
    assert isinstance(answer, DoesNotFit)
    assert answer.shortfall_gib == short_gib


@given(st.integers(1, 200_000), st.integers(1, 20_000), st.integers(1, 8192), st.sampled_from(["sliding", "chunked"]))
def test_a_windowed_layer_never_holds_more_than_a_full_one_and_a_block(context: int, step: int, window: int, kind: str):
    assert LLAMA.shape is not None
    windowed = Attention.model_validate({"kind": kind, "layers": 32, "window": window})
    shape = LLAMA.shape.model_copy(update={"attention": (windowed,)})
    model = LLAMA.model_copy(update={"shape": shape, "id": "windowed", "source": repr(shape)})
    held = kv_bytes_per_sequence(model, context, max_num_batched_tokens=step)
    full = kv_bytes_per_sequence(LLAMA, context, max_num_batched_tokens=step)
    assert held <= full + 131072 * KV_BLOCK_TOKENS
    assert held == 32 * vllm_kv_bytes(windowed, context, step, 131072 * KV_BLOCK_TOKENS // 32)
    assert held >= kv_bytes_per_sequence(model, context)  # the window alone, without a step


def test_adapters_cost_rank_times_widths():
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert lora_bytes(LLAMA, slots=2, rank=16) == 2 * 16 * 32 * per_layer * 2
    with pytest.raises(SizingError, match="MLA"):
        lora_bytes(by_id("deepseek-ai/DeepSeek-R1"), slots=1, rank=16)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"context": 0}, "context"),
        ({"concurrency": -1}, "concurrency"),
        ({"utilization": 1.5}, "utilization"),
        ({"precision": "fp3"}, "precision"),
        ({"kv_dtype": "int4"}, "kv_dtype"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_request_names_its_field(asked: dict[str, object], field: str):
    with pytest.raises(SizingError) as refused:
        fit(LLAMA, 24 * GIB, **asked)
    assert refused.value.field == field


def test_a_context_beyond_the_models_own_is_refused():
    short = LLAMA.model_copy(update={"max_positions": 4096})
    with pytest.raises(SizingError, match="more than the 4096 positions"):
        fit(short, 24 * GIB, context=8192)
    assert fit(short, 24 * GIB, context=4096).max_context == 4096


def test_the_catalogue_knows_how_long_a_context_each_model_was_made_for():
    limits = {model_id: by_id(model_id).max_positions for model_id in known_ids()}
    assert {model_id for model_id, limit in limits.items() if limit is None} == {
        "CohereForAI/aya-expanse-32b",
        "OdiaGenAI-LLM/qwen_1.5_odia_7b",
    }
    assert all((by_id(m).max_positions_source is None) == (limit is None) for m, limit in limits.items())
    sourced = {
        "Qwen/Qwen3-8B": 40960,
        "Qwen/Qwen2.5-0.5B-Instruct": 32768,
        "deepseek-ai/DeepSeek-R1": 163840,
        "meta-llama/Llama-4-Scout-17B-16E-Instruct": 10485760,
        "google/gemma-3-1b-it": 32768,
        "mistralai/Mixtral-8x7B-v0.1": 32768,
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 2048,
    }
    assert {model_id: limits[model_id] for model_id in sourced} == sourced


def test_a_context_beyond_the_catalogues_limit_is_refused_however_large_the_card():
    with pytest.raises(SizingError, match="context 1000000 is more than the 40960 positions") as refused:
        fit(by_id("Qwen/Qwen3-8B"), 288 * GIB, context=1_000_000)
    assert (refused.value.field, refused.value.value) == ("context", 1_000_000)
    assert "at most 40960" in refused.value.remedy
    assert "rope scaling" in refused.value.remedy
    answer = fit(by_id("Qwen/Qwen3-8B"), 288 * GIB, context=40_960)
    assert (answer.max_context, answer.context_limit) == (40_960, 40_960)


def test_rope_scaling_is_stated_and_an_unknown_limit_said():
    deepseek = fit(by_id("deepseek-ai/DeepSeek-R1"), 288 * GIB)
    assert any("163840" in note and "yarn, factor 40 of 4096" in note for note in deepseek.notes)
    plain = fit(by_id("Qwen/Qwen3-8B"), 288 * GIB)
    assert not any("rope" in note for note in plain.notes)
    unknown = fit(LLAMA.model_copy(update={"max_positions": None}), 288 * GIB, context=1_000_000)
    assert unknown.context_limit is None
    assert any("limit unknown" in note for note in unknown.notes)


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    groups = [Attention(kind="full", layers=draw(st.integers(1, 8)))]
    if draw(st.booleans()):
        window = draw(st.integers(1, 4096))
        groups.append(Attention(kind="sliding", layers=draw(st.integers(1, 8)), window=window))
    mla = Mla(kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128) if draw(st.booleans()) else None
    experts = Experts(count=8, per_token=2, ffn=256) if draw(st.booleans()) else None
    shape = Shape(
        hidden=draw(st.integers(64, 2048)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 128])),
        ffn=512,
        vocab=1000,
        tied=draw(st.booleans()),
        attention=tuple(groups),
        mla=mla,
        experts=experts,
    )
    counted = count_parameters("llama", shape)
    return ModelFacts(
        id="drawn",
        architecture="llama",
        native_precision="bf16",
        shape=shape,
        total_params=counted.total,
        linear_params=counted.linear,
        other_params=counted.other,
        source=repr(shape),
        confidence="inferred",
    )


requests = st.builds(
    Request,
    context=st.integers(1, 100_000),
    concurrency=st.integers(1, 64),
    precision=st.sampled_from(["bf16", "fp8", "int8", "int4", "mxfp4"]),
    kv_dtype=st.sampled_from(["auto", "fp8"]),
    utilization=st.floats(0.5, 1.0),
)


@given(models(), requests, st.integers(1, 4096))
def test_more_context_or_concurrency_never_needs_less(model: ModelFacts, request: Request, more: int):
    base = demand(model, request).total
    assert demand(model, request.model_copy(update={"context": request.context + more})).total >= base
    assert demand(model, request.model_copy(update={"concurrency": request.concurrency + more})).total > base


@given(models(), requests)
def test_tensor_parallel_never_needs_more_per_rank(model: ModelFacts, request: Request):
    needs = []
    for tp in (1, 2, 4, 8, 16, 32):
        assert model.shape is not None
        if model.shape.heads % tp == 0:
            needs.append(demand(model, request.model_copy(update={"tp": tp})).total)
    assert needs == sorted(needs, reverse=True)


@given(models(), requests)
def test_fewer_bits_never_need_more(model: ModelFacts, request: Request):
    sizes = [weight_bytes(model, precision) for precision in ("bf16", "fp8", "mxfp4", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert weight_bytes(model, "bf16") == weight_bytes(model, "fp16") == 2 * (model.total_params or 0)


@given(models(), requests, st.integers(1 * GIB, 64 * GIB))
def test_the_answer_agrees_with_itself_at_its_own_bounds(model: ModelFacts, request: Request, device: int):
    answer = fit(model, device, request)
    assert answer.fits == (answer.shortfall_gib == 0) == (answer.headroom_gib >= 0)
    assert answer.fits == (answer.max_concurrency >= request.concurrency)
    if answer.max_context:
        assert fit(model, device, request.model_copy(update={"context": answer.max_context})).fits
    if answer.max_context < 2**23:
        longer = request.model_copy(update={"context": answer.max_context + KV_BLOCK_TOKENS})
        assert not fit(model, device, longer).fits
    if answer.max_concurrency:
        assert fit(model, device, request.model_copy(update={"concurrency": answer.max_concurrency})).fits
    if answer.shortfall_gib > 0:
        enough = device + int((answer.shortfall_gib * GIB) / request.utilization) + MIB
        assert fit(model, enough, request).fits


@pytest.mark.parametrize("model_id", SIZED)
def test_every_sized_model_is_sized_at_every_precision(model_id: str):
    model = by_id(model_id)
    for precision in ("bf16", "fp16", "fp8", "int8", "int4", "mxfp4"):
        answer = fit(model, 288 * GIB, precision=precision, context=2048)
        assert answer.weights_gib > 0
