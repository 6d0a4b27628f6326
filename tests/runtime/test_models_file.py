"""models.yaml: read strictly; what is wrong is named with its line, key and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aim_kserve.settings import SettingsError
from aim_runtime.models.file import ModelsFileError, load_models, parse_models
from aim_runtime.settings import RuntimeSettings

GOOD = """\
version: 1
models:
- {name: chat, path: /models/llama, engine: vllm, priority: high, replicas: 2, aliases: [gpt-4o], profile: latency,
   python: /opt/vllm/bin/python, options: {tensor_parallel_size: 2}}
- {name: draft, uri: "file:///models/a%20b.gguf", engine: llama_cpp, max_model_len: 4096, load: on_demand,
   options: {threads: 2}}
- {name: far, engine: openai_server, options: {server_url: "http://10.0.0.1:8000"}}
- {name: assistant, variants: {chat: 90, draft: 10}}
"""


def base(*flags: str) -> RuntimeSettings:
    return RuntimeSettings.load(flags, {}, prog="aim-runtime", description="")


def test_each_model_gets_its_own_settings(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(GOOD)
    flags = ("--strict_fields", "--max_model_len", "2048", "--model_id", "org/one", "--threads", "7")
    listed, (chat, draft, far) = load_models(file, base(*flags))
    assert [model.name for model in listed.served] == ["chat", "draft", "far"]
    assert (chat.model_name, chat.model_dir, chat.engine) == ("chat", Path("/models/llama"), "vllm")
    assert (chat.max_model_len, chat.profile, chat.tensor_parallel_size) == (2048, "latency", 2)
    assert (draft.model_dir, draft.max_model_len, draft.threads) == (Path("/models/a b.gguf"), 4096, 2)
    assert far.server_url == "http://10.0.0.1:8000"
    assert all(each.strict_fields for each in (chat, draft, far))
    assert chat.model_id is None  # a flag of the one model, like --threads
    first, second = listed.served[:2]
    assert (first.aliases, first.priority, first.replicas, str(first.python)) == (
        ("gpt-4o",),
        "high",
        2,
        "/opt/vllm/bin/python",
    )
    assert (second.load, second.priority, second.replicas) == ("on_demand", "medium", 1)
    (split,) = listed.variants
    assert (split.name, dict(split.weights)) == ("assistant", {"chat": 90, "draft": 10})


def test_a_flag_of_one_engine_is_not_dropped_where_each_model_has_its_own() -> None:
    for flags in (("--threads", "2"), ("--adapters", "a=/a.gguf"), ("--deterministic",)):
        with pytest.raises(SettingsError, match=rf"{flags[0]} is one engine's: say in m.yaml which model it is for"):
            base("--models", "m.yaml", *flags)


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ("- {name: a, paht: /x}", "3: models[0].paht: unknown key; did you mean path?"),
        ("- {name: a}", "3: models[0]: give path, or uri, or variants, or options.server_url: one of them"),
        ("- {name: a, path: /x, uri: 'file:///x'}", "give path, or uri, or variants"),
        ("- {name: a b, path: /x}", "3: models[0].name: String should match pattern"),
        ("- {name: a, path: /x}\n- {name: a, path: /y}", "4: models[1].name: 'a' names models[0] too"),
        ("- {name: a, path: /x}\n- {name: b, path: /y, aliases: [a]}", "4: models[1].aliases: 'a' names models[0] too"),
        ("- {name: a, path: /x, name: b}", "3: name: given twice, first in line 3"),
        ("- {name: a, path: /x, engine: lama_cpp}", "3: models[0].engine: 'lama_cpp' is no engine"),
        ("- {name: a, path: /x, replicas: 0}", "3: models[0].replicas: Input should be greater than or equal to 1"),
        ("- {name: a, path: /x, replicas: '2'}", "3: models[0].replicas: Input should be a valid integer (got '2')"),
        ("- {name: a, path: /x, load: never}", "3: models[0].load: Input should be 'at_start' or 'on_demand'"),
        ("- {name: a, path: /x, priority: urgent}", "3: models[0].priority: Input should be 'low', 'medium' or 'high'"),
        (
            "- {name: a, uri: 's3://bucket/m'}",
            "3: models[0].uri: s3://bucket/m is not in the cache /workspace/model-cache: aim-runtime cache add s3://bucket/m",
        ),
        ("- {name: a, uri: 'file://host/m'}", "3: models[0].uri: source file://host/m: a file: source has no host"),
        (
            "- {name: a, path: /x, options: {thraeds: 2}}",
            "3: models[0].options.thraeds: unknown option; did you mean threads?",
        ),
        ("- {name: a, path: /x, options: {http_port: 1}}", "3: models[0].options.http_port: unknown option"),
        (
            "- {name: a, path: /x, engine: llama_cpp, options: {tensor_parallel_size: 2}}",
            "3: models[0].engine: --tensor_parallel_size belongs to the vllm engine; this is llama_cpp",
        ),
        (
            "- {name: a, path: /x, engine: llama_cpp, options: {threads: none}}",
            "3: models[0].options.threads: Input should be a valid integer",
        ),
        (
            "- {name: chat, path: /x}\n- {name: ab, variants: {caht: 1}}",
            "4: models[1].variants.caht: no model is named 'caht'; did you mean chat?",
        ),
        ("- {name: a, path: /x}\n- {name: ab, variants: {a: 0}}", "4: models[1].variants.a: Input should be greater"),
        (
            "- {name: a, path: /x}\n- {name: ab, variants: {a: 1}, engine: vllm}",
            "4: models[1].engine: a name with variants is no model of its own: leave it out",
        ),
        (
            "- {name: a, path: /x}\n- {name: ab, variants: {a: true}}",
            "4: models[1].variants.a: Input should be a valid",
        ),
        ("- {name: a, path: /x}\n- {name: ab, variants: {a: '5'}}", "models[1].variants.a: Input should be a valid"),
        (
            "- {name: a, path: /x}\n- {name: ab, variants: {a: 1}, replicas: 2}",
            "4: models[1].replicas: a name with variants is no model of its own: leave it out",
        ),
        ('- {name: "a\\u001b[2J", path: /x}', "3: models[0].name: has a character that cannot be printed"),
        ("- {name: a/../b, path: /x}", "3: models[0].name: has . or .. between slashes"),
        ("- {name: a, path: ''}", "3: models[0].path: empty: give a path, or leave it out"),
        ("- {name: a, path: /x, python: ''}", "3: models[0].python: empty: give a path, or leave it out"),
        ("- {name: ab, variants: {ab: 1}}", "all of them are names with variants: list the models, too"),
    ],
)
def test_what_is_wrong_is_named(models: str, says: str) -> None:
    with pytest.raises(ModelsFileError, match=re.escape(says)) as refused:
        parse_models(f"version: 1\nmodels:\n{models}\n", base(), "models.yaml")
    assert str(refused.value).startswith("models.yaml:")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models:\n- {name: a, path: /x}\n", "version: Field required"),
        ("version: 2\nmodels:\n- {name: a, path: /x}\n", "version: Input should be 1 (got 2)"),
        ("version: 1\nworkloads: []\n", "looks like a workloads file (workloads: …); a models file (models: …)"),
        ("version: 1\nmodels: []\n", "models: Tuple should have at least 1 item"),
        ("- a\n", "a list, not a mapping: a models file (models: …) is needed here"),
        ("", "empty, not a mapping"),
        ("version: 1\nmodels: [\n", "not YAML"),
    ],
)
def test_what_is_no_models_file(text: str, says: str) -> None:
    with pytest.raises(ModelsFileError, match=re.escape(says)):
        parse_models(text, base(), "models.yaml")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ModelsFileError, match=r"/nowhere/models\.yaml: No such file or directory"):
        load_models(Path("/nowhere/models.yaml"), base())
