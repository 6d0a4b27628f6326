"""Bytes of every kind of cache against vLLM's own KVCacheSpec classes, in the vLLM lane: no model is loaded."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from aim_profile.models.facts import ModelFacts
from aim_profile.models.load import load_model
from aim_profile.sizing.kv_cache import kv_bytes_per_sequence
from published_configs import require_configs
from vllm_lane import PYTHON

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parent / "vllm_cache_specs.py"
# The kind of cache: a configuration that has it, and the tensor-parallel sizes it is asked for.
PUBLISHED = {
    "full": ("Qwen--Qwen3-32B", (1, 2, 16)),
    "full and sliding": ("openai--gpt-oss-20b", (1, 8)),
    "full and sliding of other heads": ("google--gemma-4-26B-A4B", (1, 2)),
    "values narrower than keys": ("XiaomiMiMo--MiMo-V2-Flash", (1, 4)),
    "layers without attention": ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", (1, 8)),
    "latent": ("deepseek-ai--DeepSeek-V3", (1, 8)),
    "latent with an indexer": ("deepseek-ai--DeepSeek-V3.2", (1, 8)),
    "latent, an indexer for several layers": ("zai-org--GLM-5.2", (1, 8)),
    "full with an indexer": ("MiniMaxAI--MiniMax-M3", (1, 4)),
    "compressed, with and without an indexer": ("deepseek-ai--DeepSeek-V4-Flash", (1, 8)),
    "compressed, every layer": ("deepseek-ai--DeepSeek-V4-Pro", (1,)),
    "gated delta": ("Qwen--Qwen3.5-27B", (1, 2, 8)),
    "gated delta, few key heads": ("Qwen--Qwen3.5-397B-A17B", (1, 4)),
    "Mamba-2": ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", (1, 2, 16)),
    "Mamba-2, dense": ("nvidia--Nemotron-H-56B-Base-8K", (1, 8)),
    "Kimi's delta beside latent": ("moonshotai--Kimi-K3", (1, 8)),
}
WRITTEN: dict[str, dict[str, Any]] = {
    "chunked": {
        "model_type": "llama4",
        "num_hidden_layers": 8,
        "no_rope_layers": [1, 1, 1, 0] * 2,
        "attention_chunk_size": 8192,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "vocab_size": 202048,
    },
    "layers that read an earlier layer's cache": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 12,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 5 + ["full_attention"],
        "num_kv_shared_layers": 6,
        "sliding_window": 512,
        "attention_k_eq_v": False,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": None,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_size": 2560,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "intermediate_size": 10240,
        "vocab_size": 262144,
    },
    "cross": {
        "model_type": "mllama",
        "num_hidden_layers": 10,
        "cross_attention_layers": [3, 8],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}
# Tokens of a sequence, of a step, and whether the cache is fp8: below and above every window and block.
ASKED = ((100, 2048, False), (9000, 2048, False), (32768, 8192, True))
ENCODER_TOKENS = 6404


def cases() -> list[tuple[str, dict[str, Any], int]]:
    folder = require_configs()
    found = [
        (kind, json.loads((folder / name / "config.json").read_text()), tp)
        for kind, (name, sizes) in PUBLISHED.items()
        for tp in sizes
    ]
    return found + [(kind, config, tp) for kind, config in WRITTEN.items() for tp in (1, 2)]


@pytest.fixture(scope="module")
def theirs() -> dict[tuple[str, int], list[int]]:
    """Bytes that vLLM's classes give: kind and tensor-parallel size → one number for each of ASKED."""
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON} is missing: make vllm")
    keys = [(kind, tp) for kind, _, tp in cases()]
    asked = [
        {"config": config, "tp": tp, "context": context, "step": step, "fp8": fp8, "encoder": ENCODER_TOKENS}
        for _, config, tp in cases()
        for context, step, fp8 in ASKED
    ]
    command = [str(PYTHON), str(SCRIPT)]
    run = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    # What vLLM logs comes before.
    numbers: list[int] = json.loads(run.stdout[run.stdout.rindex("[") :])
    assert len(numbers) == len(asked)
    return {key: numbers[at * len(ASKED) : (at + 1) * len(ASKED)] for at, key in enumerate(keys)}


def model_of(tmp_path: Path, config: dict[str, Any]) -> ModelFacts:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_model(tmp_path)
    # Weights are not asked for here, nor are those of every family counted.
    return found.model_copy(update={"missing": ()})


@pytest.mark.parametrize("kind", [*PUBLISHED, *WRITTEN])
def test_a_sequence_holds_what_vllm_says(kind: str, theirs: dict[tuple[str, int], list[int]], tmp_path: Path) -> None:
    for named, config, tp in cases():
        if named != kind:
            continue
        model = model_of(tmp_path, config)
        ours = [
            kv_bytes_per_sequence(
                model,
                context,
                kv_dtype="fp8" if fp8 else "auto",
                tp=tp,
                encoder_tokens=ENCODER_TOKENS,
                max_num_batched_tokens=step,
            )
            for context, step, fp8 in ASKED
        ]
        assert ours == theirs[named, tp], f"tensor parallel {tp}"
