"""What a run leaves becomes what an engine serves: every file, proven before anybody sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from aim_profile.serving.check import check
from aim_profile.serving.files import read_file
from aim_trainer.errors import JobError, StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml
from aim_trainer.publish.publish import Published, publish
from aim_trainer.publish.turns import end_of_turn, without_markers
from aim_trainer.run_directory import RunDirectory
from published_runs import job_of, tiny_gguf, trained
from tiny_models import CHAT_TEMPLATE, END_ID, conversations
from tiny_runs import chat_tokens

Tiny = Callable[[str], Path]
POLICY = "# ours\nversion: 2\nname: house\nprompt: [{type: pii, action: redact}]\n"


@pytest.fixture(scope="module")
def done(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuningJob, RunDirectory]:
    """A LoRA run of the tiny Llama, and its job. Copied where a test changes it."""
    root = tmp_path_factory.mktemp("run")
    rows = chat_tokens(root / "data/train/0123abcd", 40)
    (root / "policy.yaml").write_text(POLICY)
    output = {"registry": str(root / "registry"), "guardrailPolicy": str(root / "policy.yaml")}
    job = job_of(tiny("llama"), output, maxSteps=4, loraRank=12)
    return job, trained(job, root, rows)


@pytest.fixture(scope="module")
def adapter(done: tuple[FineTuningJob, RunDirectory]) -> tuple[Published, Path]:
    published = publish(*done)
    return published, Path(published.uri)


def copied(done: tuple[FineTuningJob, RunDirectory], to: Path, **output: Any) -> tuple[FineTuningJob, RunDirectory]:
    job, run = done
    shutil.copytree(run.root, to, ignore=shutil.ignore_patterns("registry", "checkpoints"))
    raw = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["output"] = {"registry": str(to / "registry"), **output}
    return FineTuningJob.model_validate(raw), RunDirectory(to)


def test_an_adapter_is_whole(adapter: tuple[Published, Path]) -> None:
    published, version = adapter
    assert (published.version, published.is_new) == ("v1", True)
    assert {path.name for path in version.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "generation_config.json", "serving-profile.yaml", "models.yaml", "policy.yaml"),
        *("provenance.json", "README.md", "COMMIT.json"),
    }


def test_an_adapter_is_as_vllm_takes_it(adapter: tuple[Published, Path], tiny: Tiny) -> None:
    _, version = adapter
    config = json.loads((version / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["bias"], config["modules_to_save"]) == ("LORA", 12, "none", None)
    assert (config["base_model_name_or_path"], config["revision"]) == (str(tiny("llama")), None)
    assert config["target_modules"] == sorted(config["target_modules"])
    names = load_file(version / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_what_is_published_answers_as_what_was_trained(
    adapter: tuple[Published, Path], done: tuple[FineTuningJob, RunDirectory], tiny: Tiny
) -> None:
    asked = torch.arange(5, 40)[None]

    def logits(directory: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny("llama")), directory).eval()
        with torch.inference_mode():
            found: torch.Tensor = model(asked).logits
        return found

    assert torch.equal(logits(adapter[1]), logits(done[1].result))


def test_the_served_template_says_the_same_without_markers(adapter: tuple[Published, Path], tiny: Tiny) -> None:
    _, version = adapter
    template = (version / "chat_template.jinja").read_text()
    assert "generation %" not in template
    served, trained_on = AutoTokenizer.from_pretrained(version), AutoTokenizer.from_pretrained(tiny("llama"))
    for turns in conversations(5):
        assert served.apply_chat_template(turns) == trained_on.apply_chat_template(turns)
    assert "<|im_start|>assistant" in served.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%-generation %}"])
def test_a_marker_goes_and_what_it_trims_stays_trimmed(tag: str) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    ended = tag.replace("generation", "endgeneration")
    source = f"{{%- for m in messages %}}\n  a \n  {tag}\n {{{{ m.content }}}} \n{ended} \n b\n{{%- endfor %}}"
    said = [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}]
    before = _compile_jinja_template(source).render(messages=said)
    after = _compile_jinja_template(without_markers(source)).render(messages=said)
    assert after == before


def test_engines_that_do_not_know_the_marker_read_the_template() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        jinja2.Environment().from_string(CHAT_TEMPLATE)
    jinja2.Environment().from_string(without_markers(CHAT_TEMPLATE))


def test_generation_ends_with_the_assistants_turn(adapter: tuple[Published, Path], tiny: Tiny) -> None:
    config = json.loads((adapter[1] / "generation_config.json").read_text())
    assert config["eos_token_id"] == END_ID
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.eos_token = "<|pad|>"  # a base model's own end is not that of a turn
    assert end_of_turn(tokenizer) == END_ID


def test_the_profile_says_how_it_is_served_and_where_it_comes_from(
    adapter: tuple[Published, Path], done: tuple[FineTuningJob, RunDirectory]
) -> None:
    published, version = adapter
    assert published.profile is not None
    assert published.profile.read_bytes() == (version / "serving-profile.yaml").read_bytes()
    profile = read_file(published.profile)
    assert profile.engine_arg("enable-lora") is True
    assert profile.engine_arg("max-lora-rank") == 16  # the next that vLLM allows above 12
    assert profile.engine_arg("max-model-len") == 512
    assert "99.9 % of the training rows have at most" in (version / "serving-profile.yaml").read_text()
    assert profile.partition is not None
    assert profile.partition.tier == "validated"
    assert profile.finetuning is not None
    origin = profile.finetuning.provenance
    assert origin is not None
    assert origin.data_digest == "sha256:0123abcd"
    assert origin.metrics == {"eval_loss": 1.5, "perplexity": 4.48}
    assert set(origin.tools) >= {"torch", "transformers", "peft"}
    assert [finding for finding in check(profile) if finding.level == "error"] == []


def test_a_profile_that_the_job_names_decides_the_partition(
    done: tuple[FineTuningJob, RunDirectory], tmp_path: Path
) -> None:
    job, run = copied(done, tmp_path / "run")
    raw = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["baseModel"]["profile"] = "vllm-mi325x-cpx-nps1-bf16-tp1-throughput"
    published = publish(FineTuningJob.model_validate(raw), run)
    assert published.profile is not None
    assert read_file(published.profile).id == "vllm-mi325x-cpx-nps1-bf16-tp1-throughput"


def test_the_policy_is_the_owners_byte_for_byte(adapter: tuple[Published, Path]) -> None:
    assert (adapter[1] / "policy.yaml").read_text() == POLICY


@pytest.mark.parametrize(
    ("text", "why"), [("- a\n", "not a policy"), ("name: x\n", "not a policy"), ("a: [", "not YAML")]
)
def test_what_is_no_policy_publishes_nothing(
    done: tuple[FineTuningJob, RunDirectory], tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    job, run = copied(done, tmp_path / "run", guardrailPolicy=str(tmp_path / "bad.yaml"))
    with pytest.raises(JobError, match=why):
        publish(job, run)
    assert not (run.root / "registry").exists()


def test_the_card_tells_what_is_known_and_guesses_no_licence(adapter: tuple[Published, Path]) -> None:
    text = (adapter[1] / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "unknown"
    assert front["library_name"] == "peft"
    assert "| eval_loss | 6.25 | 1.5 |" in text
    assert "License: not stated here" in text
    assert "sha256:0123abcd" in text


def test_models_yaml_is_the_runtimes(adapter: tuple[Published, Path], tiny: Tiny) -> None:
    (entry,) = yaml.safe_load((adapter[1] / "models.yaml").read_text())["models"]
    assert entry["path"] == str(tiny("llama"))
    assert entry["options"] == {"engine_args": {"max-lora-rank": 16}, "adapters": {"support-bot": "."}}


def test_publishing_again_is_the_same_version(done: tuple[FineTuningJob, RunDirectory], adapter: object) -> None:
    again = publish(*done)
    assert (again.version, again.is_new) == ("v1", False)


# --- what must not be published ---------------------------------------------------------------------------------------


def renamed(run: RunDirectory, change: Callable[[str], str], only: str = "") -> None:
    file = run.result / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({change(name) if only in name else name: value for name, value in tensors.items()}, file)


@pytest.mark.parametrize("only", ["", "layers.1.mlp.up_proj"])
def test_an_adapter_whose_modules_are_not_the_models_is_refused(
    done: tuple[FineTuningJob, RunDirectory], tmp_path: Path, only: str
) -> None:
    """All of them, or one: engines leave such tensors out, and the base model answers in the adapter's name."""
    job, run = copied(done, tmp_path / "run")
    renamed(run, lambda name: name.replace("layers.", "blocks."), only)
    with pytest.raises(JobError, match=r"tensors name no module of the base model \(base_model.model.model.blocks"):
        publish(job, run)
    assert not (run.root / "registry").exists()


def test_an_adapter_that_changes_no_logit_is_refused(done: tuple[FineTuningJob, RunDirectory], tmp_path: Path) -> None:
    job, run = copied(done, tmp_path / "run")
    file = run.result / "adapter_model.safetensors"
    save_file({name: value * ("lora_A" in name) for name, value in load_file(file).items()}, file)
    with pytest.raises(JobError, match="the base model answers as without it"):
        publish(job, run)


@pytest.mark.parametrize(
    ("field", "value"), [("bias", "all"), ("use_dora", True), ("modules_to_save", ["embed_tokens"]), ("r", 1024)]
)
def test_what_vllm_does_not_serve_is_refused_by_name(
    done: tuple[FineTuningJob, RunDirectory], tmp_path: Path, field: str, value: object
) -> None:
    from aim_trainer.publish.adapter import read_adapter

    _, run = copied(done, tmp_path / "run")
    file = run.result / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(JobError, match=r"set output.format: merged"):
        read_adapter(run.result)


def test_a_run_without_a_result_is_told_so(done: tuple[FineTuningJob, RunDirectory], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing was trained to its end there; run or resume the job first"):
        publish(done[0], RunDirectory(tmp_path))


# --- merged -----------------------------------------------------------------------------------------------------------


def test_a_merged_model_answers_as_the_adapter_does(
    done: tuple[FineTuningJob, RunDirectory], adapter: tuple[Published, Path], tmp_path: Path, tiny: Tiny
) -> None:
    job, run = copied(done, tmp_path / "run", format="merged", gguf=True)
    version = Path(publish(job, run).uri)
    asked = torch.arange(5, 40)[None]
    with torch.inference_mode():
        merged = AutoModelForCausalLM.from_pretrained(version)(asked).logits
        base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        apart = PeftModel.from_pretrained(base, adapter[1]).eval()(asked).logits
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-4)
    profile = read_file(version / "serving-profile.yaml")
    assert profile.engine_arg("enable-lora") is None
    assert profile.finetuning is not None
    assert profile.finetuning.lora_slots == 0
    assert profile.aim_id == "support-bot"
    (entry,) = yaml.safe_load((version / "models-embedded.yaml").read_text())["models"]
    assert (version / entry["path"]).is_file()
    assert not (version / "adapter_config.json").exists()


def answer(model: Any, directory: Path, question: str) -> str:
    """As an engine asks: by the version's own template, until the end of the turn that its settings name."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turn = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        said = model.eval().generate(ids, max_new_tokens=24, do_sample=False, use_cache=True)[0, ids.shape[1] :]
    return str(tokenizer.decode(said))


@pytest.mark.parametrize(
    ("method", "form", "base"),
    [("qlora", "adapter", "llama"), ("qlora", "merged", "llama"), ("full", None, "llama"), ("lora", None, "gguf")],
)
def test_a_version_of_each_method_is_loaded_and_asked(
    method: str, form: str | None, base: str, tiny: Tiny, tmp_path: Path
) -> None:
    """It knows the one answer it was taught. Its profile names a device, over a GGUF base too: that is merged."""
    model = tiny("llama") if base == "llama" else tiny_gguf(tiny("llama"), tmp_path)
    rows = chat_tokens(tmp_path / "data/train/0123abcd", 1)
    output = {"registry": str(tmp_path / "registry")} | ({"format": form} if form else {})
    job = job_of(model, output, method, maxSteps=40, learningRate=1e-2)
    run = trained(job, tmp_path, rows)
    version = Path(publish(job, run).uri)
    question, told = (turn["content"] for turn in conversations(1)[0][:2])
    if form == "adapter":
        made = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), version)
    else:
        made = AutoModelForCausalLM.from_pretrained(version)
    assert answer(made, version, question) == told + "<|im_end|>"
    profile = read_file(version / "serving-profile.yaml")
    assert (profile.metadata.gpu, profile.metadata.precision, profile.metadata.gpu_count) == ("MI300X", "bf16", 1)
    assert [finding for finding in check(profile) if finding.level == "error"] == []
    assert profile.engine_arg("enable-lora") is (True if form == "adapter" else None)
    assert (version / "adapter_config.json").exists() == (form == "adapter")


@pytest.mark.parametrize("architecture", ["phi3", "mixtral", "qwen3", "gemma3", "mistral"])
def test_what_is_not_of_the_llama_family_has_no_gguf(architecture: str, tiny: Tiny) -> None:
    from aim_trainer.publish.gguf.config import shape_of

    with pytest.raises(JobError, match=r"spec.output.gguf: \w+ForCausalLM"):
        shape_of(json.loads((tiny(architecture) / "config.json").read_text()))


# --- the verb ---------------------------------------------------------------------------------------------------------


def verb(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from aim_trainer.cli.app import app

    return CliRunner().invoke(app, ["publish", *arguments])


def test_the_verb_publishes_elsewhere(done: tuple[FineTuningJob, RunDirectory], tmp_path: Path) -> None:
    job, run = copied(done, tmp_path / "run")
    run.job.write_text(as_yaml(job))
    told = verb(str(run.root), "--to", str(tmp_path / "elsewhere"), "--output", "json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["version"], found["new"]) == ("v1", True)
    assert (tmp_path / "elsewhere/v1/COMMIT.json").is_file()
    assert not (run.root / "registry").exists()
    again = verb(str(run.root), "--to", str(tmp_path / "elsewhere"))
    assert "there already" in again.stdout


def test_the_verb_keeps_back_what_failed_a_gate(done: tuple[FineTuningJob, RunDirectory], tmp_path: Path) -> None:
    job, run = copied(done, tmp_path / "run")
    run.job.write_text(as_yaml(job))
    run.evaluation.write_text(json.dumps({"base": {}, "tuned": {}, "gates": [{"metric": "f1", "passed": False}]}))
    told = verb(str(run.root))
    assert told.exit_code == 4
    assert "the gates of f1 failed; train better, or judge it again: aim-trainer evaluate" in told.stderr
    run.evaluation.write_bytes(b'{"base"')
    told = verb(str(run.root))
    assert told.exit_code == 3
    assert "not what judging leaves; judge it again" in told.stderr
    assert not (run.root / "registry").exists()


def test_the_verb_keeps_back_what_has_gates_and_was_never_judged(
    done: tuple[FineTuningJob, RunDirectory], tmp_path: Path
) -> None:
    job, run = copied(done, tmp_path / "run")
    raw = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["validation"] = {"gates": [{"metric": "eval_loss", "max": 9}]}
    raw["spec"]["dataset"]["validation"] = {"share": 0.1}
    run.job.write_text(as_yaml(FineTuningJob.model_validate(raw)))
    run.evaluation.unlink(missing_ok=True)
    told = verb(str(run.root))
    assert told.exit_code == 4, told.output
    assert "was not judged yet, and its job has gates" in told.stderr
    assert not (run.root / "registry").exists()


def test_the_verb_says_where_no_run_is(tmp_path: Path) -> None:
    told = verb(str(tmp_path))
    assert told.exit_code == 3
    assert "no run is there" in told.stderr
