"""Models that can be loaded, and those that are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_constant_schedule_with_warmup, get_scheduler

from aim_trainer.errors import JobError
from aim_trainer.recipe.fetched import fetched
from aim_trainer.recipe.model import load, save
from aim_trainer.recipe.optimizer import learning_rate, make_optimizer
from aim_trainer.recipe.weights import trained_weights
from published_runs import tiny_gguf
from rclone_servers import S3_ENVIRONMENT, s3_server
from tiny_runs import tiny_job

Tiny = Callable[[str], Path]


def test_an_architecture_that_is_not_known_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"model_type": "gpt2"}))
    with pytest.raises(JobError, match=r"modelId: .*: architecture 'gpt2' is not known; known are gemma2, .*qwen3"):
        load(tiny_job(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing/model/here", "there is no such file or directory"),
        ("empty", "a directory without config.json; give a Hugging Face model directory"),
        ("model.bin", "a file, but not a .gguf one; give the model's directory"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").touch()
    with pytest.raises(JobError, match=told) as problem:
        load(tiny_job(tmp_path / name))
    assert problem.value.field == "spec.baseModel.modelId"


def test_a_model_on_s3_is_fetched_once_and_loaded(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load(tiny_job(tiny("llama"))).model
    shutil.copytree(tiny("llama"), tmp_path / "bucket/models/tiny")
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server(tmp_path) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        # Text, because a path would swallow a slash.
        with pytest.raises(JobError, match=r"modelId: s3://bucket/models/other: no files there"):
            load(tiny_job("s3://bucket/models/other"))
        fetched("s3://bucket/models/tiny")
    # The server is gone: nothing is asked again.
    theirs = dict(load(tiny_job("s3://bucket/models/tiny")).model.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in here.named_parameters())


def test_a_torn_model_is_refused_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(JobError, match=r"^spec.baseModel.modelId: .*model: .*no file named") as problem:
        load(tiny_job(tmp_path / "model"))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("file", "holds", "told"),
    [
        ("config.json", {"hidden_size": "a"}, "expected int, got str"),
        ("config.json", {"vocab_size": 10}, "ignore_mismatched_sizes"),
        ("model.safetensors", "", "header too small"),
        ("tokenizer.json", "{}", "added_tokens"),
    ],
)
def test_whatever_a_damaged_model_makes_of_the_libraries_is_told_in_one_line(
    tiny: Tiny, tmp_path: Path, file: str, holds: str | dict[str, object], told: str
) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    damaged = tmp_path / "model" / file
    changed = json.dumps(json.loads(damaged.read_bytes()) | holds) if isinstance(holds, dict) else holds
    damaged.write_text(changed)
    with pytest.raises(JobError, match=rf"^spec.baseModel.modelId: .*{told}.*; look at its files, or") as problem:
        load(tiny_job(tmp_path / "model"))
    assert "\n" not in str(problem.value)


def test_target_modules_that_match_nothing_name_those_there_are(tiny: Tiny) -> None:
    told = r"loraTargetModules: 'query' is no linear module of this model; there are down_proj, .*v_proj; all-linear"
    with pytest.raises(JobError, match=told):
        load(tiny_job(tiny("llama"), loraTargetModules=["q_proj", "query"]))


def test_target_modules_are_those_asked_for(tiny: Tiny) -> None:
    model = load(tiny_job(tiny("qwen3"), loraTargetModules=["q_proj", "1.mlp.up_proj"], loraRank=4)).model
    adapted = {name.partition(".lora_")[0].partition("layers.")[2] for name in trained_weights(model)}
    assert adapted == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}


def test_rslora_scales_by_the_root_of_the_rank(tiny: Tiny) -> None:
    for rslora, scale in ((False, 32 / 16), (True, 32 / 4)):
        model = load(tiny_job(tiny("llama"), rslora=rslora)).model
        assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": scale}


def test_the_same_adapter_each_time(tiny: Tiny) -> None:
    one, other = (trained_weights(load(tiny_job(tiny("llama"))).model) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    seeded = trained_weights(load(tiny_job(tiny("llama"), seed=7)).model)
    assert any(not torch.equal(one[name], seeded[name]) for name in one)


def test_decay_spares_norms(tiny: Tiny) -> None:
    job = tiny_job(tiny("llama"), "full", weightDecay=0.1)
    weights = trained_weights(load(job).model)
    decayed, spared = make_optimizer(weights, job.spec.hyperparameters).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(weight): name for name, weight in weights.items()}
    assert {names[id(weight)].rpartition(".")[0].rpartition(".")[2] for weight in spared["params"]} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    assert len(decayed["params"]) + len(spared["params"]) == len(weights)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 5])
def test_the_schedule_is_transformers_own(tiny: Tiny, schedule: str, warmup: float) -> None:
    job = tiny_job(tiny("llama"), schedule=schedule, warmup=warmup)
    steps, warm = 30, int(warmup) if warmup >= 1 else round(warmup * 30)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=job.spec.hyperparameters.learning_rate)
    if schedule == "constant":
        theirs = get_constant_schedule_with_warmup(optimizer, warm)
    else:
        theirs = get_scheduler(schedule, optimizer, warm, steps)
    for step in range(steps):
        assert learning_rate(job, step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.fixture(scope="module")
def as_gguf(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tiny("llama"), tmp_path_factory.mktemp("gguf"))


def test_a_gguf_file_is_a_base(as_gguf: Path, tiny: Tiny, tmp_path: Path) -> None:
    loaded = load(tiny_job(as_gguf, "full"))
    assert loaded.tokenizer.chat_template
    ids = torch.tensor([loaded.tokenizer("How many lamps does Ada have in Ghent?")["input_ids"]])
    assert ids.tolist() == [AutoTokenizer.from_pretrained(tiny("llama"))(loaded.tokenizer.decode(ids[0]))["input_ids"]]
    save(loaded, tmp_path)
    written, model = AutoModelForCausalLM.from_pretrained(tmp_path), loaded.model.eval()
    theirs = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        assert torch.equal(written(ids).logits, model(ids).logits)
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-3)


def test_a_gguf_file_can_be_quantised_and_classified(as_gguf: Path) -> None:
    quantised = load(tiny_job(as_gguf, "qlora", quantization="nf4"))
    assert "Linear4bit" in {type(module.base_layer).__name__ for module in quantised.model.modules()
                            if hasattr(module, "base_layer")}  # fmt: skip
    classifier = load(tiny_job(as_gguf, template="classification", labels=["a", "b", "c"])).model
    assert (classifier.config.num_labels, classifier.config.id2label) == (3, {0: "a", 1: "b", 2: "c"})


def test_a_gguf_files_metadata_is_read_once_for_each_model(as_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of its own: seconds each time, with a vocabulary of usual size."""
    file = as_gguf.with_name("other.gguf")
    shutil.copyfile(as_gguf, file)
    read = list[str]()

    class Counted(gguf.GGUFReader):  # type: ignore[misc]  # untyped where we check
        def __init__(self, path: str) -> None:
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    for _ in range(2):
        load(tiny_job(file))
    assert read == [str(file)] * 4  # the configuration, the tokenizer, and twice the weights
    tokenizer = load(tiny_job(file)).tokenizer
    tokenizer.chat_template = None
    assert load(tiny_job(file)).tokenizer.chat_template
