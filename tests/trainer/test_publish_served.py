"""What is published answers as transformers does: the embedded model with an adapter, by llama.cpp and by vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aim_trainer.data.tokens import Row, Tokens, write_tokens
from aim_trainer.publish.publish import publish
from aim_trainer.publish.weights import tuned_model, tuned_tokenizer
from asked_runtime import SERVING, chat
from published_runs import job_of, trained
from tiny_models import conversations
from vllm_lane import MODEL_DIR, PYTHON, require_vllm_lane

np = pytest.importorskip("numpy")
TOKENS = 16
ASKED = [{"role": "user", "content": "Write a long story about an old ship and its crew."}]
BODY = {"messages": ASKED, "max_tokens": TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": 1}


class Tuned:
    """The version, and what transformers says of the same weights."""

    def __init__(self, version: Path, model: Any, tokenizer: Any) -> None:
        self.version, self._model, self._tokenizer = version, model, tokenizer
        self.prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        self.greedy = self._greedy()

    def _greedy(self) -> list[int]:
        with torch.inference_mode():
            answer = self._model.generate(
                torch.tensor([self.prompt]),
                max_new_tokens=TOKENS,
                do_sample=False,
                use_cache=True,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        found: list[int] = answer[0, len(self.prompt) :].tolist()
        return found

    def agrees(self, answer: dict[str, Any]) -> None:
        """The same 16 tokens, or each token's logprob within 0.1 of transformers' at the same place."""
        content = answer["choices"][0]["logprobs"]["content"]
        said = "".join(each["token"] for each in content)
        if said == self._tokenizer.decode(self.greedy[: len(content)]):
            return
        tokens = self._tokenizer.encode(said, add_special_tokens=False)[: len(content)]
        with torch.inference_mode():
            logits = self._model(torch.tensor([self.prompt + tokens])).logits[0, len(self.prompt) - 1 : -1]
        wanted = torch.log_softmax(logits.float(), -1)[range(len(tokens)), tokens]
        apart = [abs(each["logprob"] - float(own)) for each, own in zip(content, wanted, strict=True)]
        assert max(apart) < 0.1, (said, self._tokenizer.decode(self.greedy), apart)


@pytest.fixture(scope="module")
def tuned(smollm2_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """LoRA for six steps on short chats, published as an adapter and as GGUF."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("smollm2")
    reader = AutoTokenizer.from_pretrained(smollm2_hf)
    rows = []
    for turns in conversations(8, seed=3):
        ids = np.asarray(reader.apply_chat_template(turns[:2], return_dict=False), np.int32)
        rows.append(Row(ids, np.ones(len(ids), np.uint8)))
    write_tokens(root / "data/train/feed", rows, {})
    output = {"registry": str(root / "registry"), "gguf": True}
    job = job_of(smollm2_hf, output, maxSteps=6, batchSize=2, learningRate=8e-3, loraRank=8)
    run = trained(job, root, Tokens(root / "data/train/feed"))
    version = Path(publish(job, run).uri)
    tokenizer = tuned_tokenizer(job)
    return Tuned(version, tuned_model(job, run.result, tokenizer), tokenizer)


def test_the_tuned_model_says_something_else_than_the_base(tuned: Tuned) -> None:
    with torch.inference_mode(), tuned._model.disable_adapter():
        assert tuned._greedy() != tuned.greedy


def test_the_gguf_answers_through_the_runtime(tuned: Tuned) -> None:
    if not SERVING.is_file():
        pytest.skip(f"{SERVING} is missing: make test sets it up")
    tuned.agrees(chat(["--models", "models-embedded.yaml"], tuned.version, BODY | {"model": "support-bot"}, 120))


@pytest.mark.vllm
def test_the_adapter_answers_through_vllm(tuned: Tuned) -> None:
    require_vllm_lane()
    models = yaml.safe_load((tuned.version / "models.yaml").read_text())
    (entry,) = models["models"]
    assert entry["path"] == str(MODEL_DIR.resolve())
    entry |= {
        "python": str(PYTHON),
        "max_concurrency": 2,
    }  # the lane's own: vLLM's CPU build is in an environment apart
    entry["options"]["engine_args"] |= {"enforce-eager": True, "kv-cache-memory-bytes": "256M", "dtype": "float32"}
    (tuned.version.parent / "lane.yaml").write_text(json.dumps(models))
    flags = ["--models", str(tuned.version.parent / "lane.yaml")]
    tuned.agrees(chat(flags, tuned.version, BODY | {"model": "support-bot"}, 400))
