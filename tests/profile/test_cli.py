"""The command line: every verb's output, exit codes, and errors of one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner, Result

from aim_profile.cli import options as cli
from aim_profile.cli import output, profiles
from aim_profile.cli.app import app
from aim_profile.gpus import catalog
from aim_profile.models import facts
from aim_profile.models.known import known_ids
from aim_profile.nodes import facts as node_facts
from aim_profile.serving import files, profile
from aim_profile.sizing import kv_cache
from sysfs_tree import MI300X, write_kfd_node, write_mi300x_cpx

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
FIT_FIELDS = {
    *("fits", "model", "gpu", "mode", "tier", "precision", "context", "max_context"),
    *("weights_gib", "kv_bytes_per_token", "kv_gib", "overhead_gib", "budget_gib", "headroom_gib"),
    *("context_limit", "max_num_batched_tokens"),
    *("max_concurrency", "shortfall_gib", "alternatives"),
}


def run(*arguments: object, code: int = 0) -> Result:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def refusal(*arguments: object, code: int = 2) -> str:
    """The one line on stderr; nothing on stdout."""
    found = run(*arguments, code=code)
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("aim-profile: ")
    return found.stderr


@pytest.mark.parametrize(
    ("spelled", "source"),
    [
        (cli.Deployment, catalog.Deployment),
        (cli.Precision, facts.Precision),
        (cli.AimPrecision, profile.AimPrecision),
        (cli.Metric, profile.Metric),
        (cli.Engine, profile.Engine),
        (cli.KvDtype, kv_cache.KvDtype),
        (cli.AllocMode, node_facts.AllocMode),
        (cli.Priority, profile.Priority),
        (cli.Form, files.Form),
        (output.Output, output.Output),
    ],
)
def test_choices_are_those_of_their_sources(spelled: object, source: object) -> None:
    assert get_args(spelled) == get_args(source)


def test_every_kind_of_file_has_a_schema() -> None:
    assert get_args(cli.SchemaKind) == profiles.kinds()
    for kind in profiles.kinds():
        assert json.loads(run("schema", kind).stdout)["title"] == f"aim-profile {kind}"


def test_gpus_are_listed_with_their_modes() -> None:
    found = {row["name"]: row for row in json.loads(run("gpus", "-o", "json").stdout)}
    assert found["MI300X"]["hbm_mib"] == 196592
    assert len(found) == 10
    one = json.loads(run("gpus", "mi308x", "-o", "json").stdout)
    assert {mode["mode"]: mode["partitions"] for mode in one["modes"]}["CPX/NPS4"] == 4
    assert "MI300X" in run("gpus").stdout
    assert "CPX/NPS4" in run("gpus", "MI300X").stdout


def test_models_are_listed_with_what_is_not_known() -> None:
    found = {row["id"]: row for row in json.loads(run("models", "-o", "json").stdout)}
    assert tuple(found) == known_ids()
    assert found[LLAMA]["kv_bytes_per_token"] == 131072
    unsized = found["OdiaGenAI-LLM/qwen_1.5_odia_7b"]
    assert unsized["weights_gib"] is None
    assert unsized["status"].startswith("known, not sized")
    assert "the real id is" in refusal("models", "deepseek-ai/Distill-Llama-8B")


def test_fit_answers_the_three_questions() -> None:
    small = ("--gpu", "MI300X", "--partition", "CPX/NPS4", "--precision", "bf16")
    fits = json.loads(run("fit", LLAMA, *small, "--context", 32768, "-o", "json").stdout)
    assert set(fits) == FIT_FIELDS
    assert (fits["fits"], fits["max_concurrency"], fits["shortfall_gib"]) == (True, 1, 0)
    assert (fits["model"], fits["gpu"], fits["mode"], fits["tier"]) == (LLAMA, "MI300X", "CPX/NPS4", "validated")
    assert (fits["precision"], fits["context"]) == ("bf16", 32768)
    assert fits["max_context"] >= 32768
    large = json.loads(run("fit", "deepseek-ai/DeepSeek-R1", "--gpu", "MI300X", "-o", "json", code=1).stdout)
    assert (large["fits"], large["max_concurrency"]) == (False, 0)
    assert large["shortfall_gib"] == pytest.approx(641.3 * 1.02 + 2.3 + 0.536 - 172.786, abs=0.01)
    mixtral = json.loads(run("fit", "mistralai/Mixtral-8x7B-Instruct-v0.1", *small, "-o", "json", code=1).stdout)
    assert any(option["partition"] == "DPX/NPS2" for option in mixtral["alternatives"])
    assert "short by" in run("fit", "deepseek-ai/DeepSeek-R1", "--gpu", "MI300X", code=1).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "MI9000"), "no accelerator named 'MI9000'"),
        (("--gpu", "MI300X", "--partition", "TPX"), "MI300X has no TPX mode"),
        (("--gpu", "MI300X", "--partition", "CPX/NPS9"), "is not a partition mode"),
        (("--gpu", "MI300X", "--utilization", "1.5"), "utilization"),
        (("--gpu", "MI300X", "--tp", "5"), "tensor parallel 5"),
        (("--memory", "24"), "write a number with a unit"),
        (("--memory", "24GiB", "--gpu", "MI300X"), "give one of them"),
        (("--partition", "CPX"), "name the GPU too"),
    ],
)
def test_fit_refuses_what_it_cannot_size(arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal("fit", LLAMA, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [("fit", LLAMA, "--nope"), ("fit",), ("nope",), ("fit", LLAMA, "--context", "0"), ("gpus", "-o", "xml")],
)
def test_wrong_usage_is_bad_input(arguments: tuple[str, ...]) -> None:
    found = run(*arguments, code=2)
    assert found.stdout == ""
    assert "Usage" in found.stderr


def test_fit_reads_the_node(cpx_node: Path) -> None:
    found = run("fit", LLAMA, "--node", cpx_node)
    assert "MI300X CPX/NPS4 (validated on bare-metal): 24574 MiB" in found.stdout
    assert "no card 5" in refusal("fit", LLAMA, "--node", cpx_node, "--card", 5)


def test_fit_takes_a_plain_amount_of_memory() -> None:
    assert json.loads(run("fit", LLAMA, "--memory", "24GiB", "-o", "json").stdout)["fits"] is True


def test_list_has_a_row_for_each_model_and_precision() -> None:
    found = run("list")
    lines = found.stdout.splitlines()
    assert len(lines) - 1 >= 114
    assert len({line.split()[0] for line in lines}) == len(lines)
    assert all(len(line.split()) >= 9 for line in lines)
    assert "OdiaGenAI-LLM/qwen_1.5_odia_7b" in found.stderr
    data = json.loads(run("list", "-o", "json").stdout)
    assert len(data) == len(lines) - 1
    assert {row["type"] for row in data} == {"unoptimized"}
    assert not any(row["measured"] for row in data)


def test_list_says_what_fits_nowhere() -> None:
    found = run("list", "--gpu", "MI210", "--model", LLAMA)
    assert "fp8" in found.stderr
    assert len(found.stdout.splitlines()) == 3
    many = run("list", "--model", LLAMA, "--every-mode", "--precision", "bf16")
    assert len(many.stdout.splitlines()) == 1 + 7


def test_every_reference_listed_can_be_shown_and_exported() -> None:
    reference = json.loads(run("list", "--model", LLAMA, "-o", "json").stdout)[0]["profile"]
    assert run("show", reference).stdout.startswith("profile")
    body = yaml.safe_load(run("show", reference, "-o", "yaml").stdout)
    assert body == yaml.safe_load(run("export", reference).stdout)
    assert json.loads(run("export", reference, "--form", "unified").stdout)["model_id"] == LLAMA


def test_export_lays_files_out_as_aim_does_and_validate_reads_them(tmp_path: Path) -> None:
    run("export", f"{LLAMA}/vllm-mi300x-fp8-tp1-latency", "--form", "aim", "--dir", tmp_path)
    file = tmp_path / LLAMA / "vllm-mi300x-fp8-tp1-latency.yaml"
    (found,) = json.loads(run("validate", file, "-o", "json").stdout)
    assert (found["form"], found["findings"]) == ("aim", [])
    assert run("show", file).stdout.startswith("profile")
    selected = json.loads(run("select", LLAMA, "--gpu", "MI300X", "--profiles", tmp_path, "-o", "json").stdout)
    assert selected["candidates"][0]["path"] == str(file)
    file.write_text(file.read_text(encoding="utf-8").replace("8192", "8388608"), encoding="utf-8")
    assert "short by" in run("validate", file, code=1).stdout
    file.write_text("metadata: 1", encoding="utf-8")
    assert "vllm-mi300x-fp8-tp1-latency.yaml" in refusal("validate", file)


def test_show_takes_a_model_and_a_device(tmp_path: Path) -> None:
    options = ("--gpu", "MI300X", "--partition", "CPX/NPS1", "--alloc-mode", "ALL", "--memory-limit", "20GB")
    body = json.loads(run("show", LLAMA, *options, "--priority", "high", "-o", "json").stdout)
    assert body["gpu_sharing"] == {"memory_limit_gb": 20.0, "qos_priority": "high"}
    assert body["engine_args"]["gpu-memory-utilization"] < 0.1125
    assert "short by" in refusal("show", "Qwen/Qwen3-32B", "--gpu", "MI300X", "--partition", "CPX", "--tp", 1, code=1)
    assert "names no model" in refusal("show", "nonsense")
    assert "--memory-limit" not in refusal("show", LLAMA, "--gpu", "MI300X", "--memory-limit", "20")
    assert "No such file" in refusal("export", LLAMA, "--gpu", "MI300X", "--out", tmp_path / "absent" / "file")


def test_select_explains_itself() -> None:
    found = json.loads(run("select", LLAMA, "--gpu", "MI300X", "--partition", "CPX/NPS4", "-o", "json").stdout)
    assert found["chosen"] == f"{LLAMA}/vllm-mi300x-cpx-nps4-bf16-tp1-latency"
    assert all(candidate["reason"] for candidate in found["candidates"])
    nothing = run("select", "deepseek-ai/DeepSeek-R1", "--gpu", "MI300X", "--partition", "CPX/NPS4", code=1)
    assert "nothing matches" in nothing.stdout


@pytest.fixture
def cpx_node(tmp_path: Path) -> Path:
    file = tmp_path / "node.yaml"
    file.write_text("version: 1\nname: n\ngpu: MI300X\ncards: 2\npartition: CPX/NPS4\n", encoding="utf-8")
    return file


def test_a_node_is_shown_exported_and_read_back(cpx_node: Path, tmp_path: Path) -> None:
    found = json.loads(run("node", "--node", cpx_node, "-o", "json").stdout)
    card = found["cards"][0]
    assert (card["product"], card["compute_partition"], card["memory_partition"]) == ("MI300X", "CPX", "NPS4")
    assert {"pci_id", "product", "compute_partition", "memory_partition", "hive_id", "partitions"} <= set(card)
    assert {"index", "compute_units", "memory_mib", "render_minor"} <= set(card["partitions"][0])
    assert len(card["partitions"]) == 8
    again = tmp_path / "again.yaml"
    run("node", "export", "--node", cpx_node, again)
    assert json.loads(run("node", "--node", again, "-o", "json").stdout) == found
    assert run("node", "export", "--node", cpx_node).stdout == again.read_text(encoding="utf-8")
    assert "CPX/NPS4" in run("node", "--node", cpx_node).stdout


def test_select_reads_the_node(cpx_node: Path) -> None:
    found = json.loads(run("select", LLAMA, "--node", cpx_node, "-o", "json").stdout)
    assert found["devices"] == "8 x MI300X CPX/NPS4"
    assert "no card 7" in refusal("select", LLAMA, "--node", cpx_node, "--card", 7)


def test_a_node_that_cannot_be_read_is_named(cpx_node: Path, tmp_path: Path) -> None:
    assert "absent" in refusal("node", "--root", tmp_path / "absent")
    assert "name two nodes" in refusal("node", "--node", cpx_node, "--root", tmp_path)
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    assert "bad.json" in refusal("node", "--amd-smi", tmp_path / "bad.json")


@pytest.mark.parametrize(
    "verb", ["gpus", "models", "node", "doctor", "fit", "list", "select", "show", "export", "validate", "schema"]
)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    text = run(verb, "--help").stdout
    assert "Example:" in text
    assert "--help" in text


def test_the_console_script_pipes_whole_lines_and_only_facts() -> None:
    command = [sys.executable, "-m", "aim_profile", "list"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "40"})
    assert "\x1b" not in found.stdout
    assert len(found.stdout.splitlines()) >= 115
    error = subprocess.run(
        [*command[:3], "fit", "nope", "--gpu", "MI300X"], capture_output=True, text=True, check=False
    )
    assert (error.returncode, error.stdout) == (2, "")
    assert "Traceback" not in error.stderr


def test_equal_remarks_about_cards_are_said_once(tmp_path: Path) -> None:
    for card in range(3):
        write_kfd_node(tmp_path / "nodes", card, location_id=(5 + card) << 8, compute_units=304, xcds=8, **MI300X)
    lines = run("node", "--root", tmp_path).stdout.splitlines()
    assert [line for line in lines if "memory per partition derived" in line] == [lines[-1]]
    assert lines[-1].startswith("cards 0-2  ")
    assert "SPX/NPS?" in lines[-3]


def test_fit_takes_the_size_of_a_device_whose_memory_mode_is_not_readable(tmp_path: Path) -> None:
    """KFD alone says what each device holds; that is all that fitting needs."""
    write_mi300x_cpx(tmp_path / "nodes")
    found = run("fit", LLAMA, "--root", tmp_path, "--context", 4096)
    assert "a device of 24560 MiB" in found.stdout


def test_fit_says_aside_that_a_mode_is_not_possible() -> None:
    found = run("fit", LLAMA, "--gpu", "MI300X", "--partition", "CPX/NPS2", "-o", "json", code=1)
    assert json.loads(found.stdout)["fits"]
    assert json.loads(found.stdout)["tier"] == "unsupported"
    assert found.stderr == "MI300X CPX/NPS2 is unsupported on bare-metal: the answer is about memory alone\n"
    assert run("fit", LLAMA, "--gpu", "MI300X", "--partition", "CPX/NPS1").stderr == ""


def test_help_groups_the_verbs_by_what_they_are_about() -> None:
    first = [line.split()[1] for line in run("--help").stdout.splitlines() if line.startswith(("╭─ ", "│ "))]
    order = [first.index(word) for word in ("Facts", "gpus", "node", "Profiles", "list", "Plans", "plan", "render")]
    assert order == sorted(order)


def test_version_is_the_package_s() -> None:
    assert run("--version").stdout == f"aim-profile {version('aim-kserve')}\n"


@pytest.mark.parametrize(
    ("profile_id", "says"),
    [
        ("vllm-mi300x-bf16-tp9-latency", "tp9 is none of tp1, tp2"),
        ("vllm-mi300x-fp7-tp1-latency", "fp7 is none of int4, int8"),
        ("vllm-mi300x-cpx-nps3-bf16-tp1-latency", "nps3 is none of nps1, nps2"),
        ("sglang-mi300x-bf16-tp1-latency", "sglang is none of vllm"),
        ("vllm-mi300x-bf16-tp1-speed", "speed is none of latency"),
        ("nonsense", "is not a profile id; write ENGINE-GPU"),
    ],
)
def test_a_wrong_profile_id_says_which_part(profile_id: str, says: str) -> None:
    assert says in refusal("show", f"{LLAMA}/{profile_id}")


ID = f"{LLAMA}/vllm-mi300x-fp8-tp1-latency"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("fit", LLAMA, "--gpu", "MI300X", "--card", "3"), "--card 3"),
        (("fit", LLAMA, "--gpu", "MI300X", "--node", "node.yaml"), "--node node.yaml"),
        (("fit", LLAMA, "--memory", "24GiB", "--root", "."), "--root ."),
        (("select", LLAMA, "--gpu", "MI300X", "--card", "1"), "--card 1"),
        (("select", LLAMA, "--gpu", "MI300X", "--node", "node.yaml"), "--node node.yaml"),
        (("show", ID, "--gpu", "MI355X"), "--gpu MI355X"),
        (("show", ID, "--partition", "CPX/NPS4"), "--partition CPX/NPS4"),
        (("show", ID, "--precision", "bf16"), "--precision bf16"),
        (("show", ID, "--metric", "throughput"), "--metric throughput"),
        (("show", ID, "--tp", "2"), "--tensor-parallel 2"),
        (("export", ID, "--precision", "bf16"), "--precision bf16"),
        (("export", ID, "--dir", "/proc/nowhere", "--out", "x.yaml"), "--out x.yaml"),
        (("render", ID, "--gpu", "MI355X"), "--gpu MI355X"),
        (("render", ID, "--workloads", "w.yaml"), "--workloads w.yaml"),
    ],
)
def test_an_option_that_something_else_decides_is_not_ignored(arguments: tuple[str, ...], option: str) -> None:
    assert f"{option}: " in refusal(*arguments)


def test_what_an_id_says_may_be_said_again() -> None:
    plain = run("show", ID, "-o", "json").stdout
    assert run("show", ID, "--precision", "fp8", "--metric", "latency", "--tp", "1", "-o", "json").stdout == plain
    throughput = ID.replace("latency", "throughput")
    assert '"metric": "throughput"' in run("show", throughput, "-o", "json").stdout


def test_a_profile_file_is_shown_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    run("export", ID, "--out", file)
    run("show", file)
    for option, value in (("gpu", "MI300X"), ("precision", "fp8"), ("context", "512"), ("memory-limit", "4GiB")):
        assert f"--{option} " in refusal("show", file, f"--{option}", value)
    assert "--metric latency" in refusal("show", file, "--metric", "latency")


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", ID.replace("mi300x", "mi300x-cpx-nps8")),
        *(
            (verb, LLAMA, "--gpu", "MI300X", "--partition", "CPX/NPS8")
            for verb in ("show", "export", "render", "select")
        ),
    ],
)
def test_no_profile_is_for_a_mode_that_no_driver_switches_to(arguments: tuple[str, ...]) -> None:
    assert "MI300X CPX/NPS8 is unsupported on bare-metal" in refusal(*arguments, code=1)


def test_a_memory_limit_of_nothing_is_refused() -> None:
    assert "memory-limit: '0GiB' is less than a byte" in refusal(
        "show", LLAMA, "--gpu", "MI300X", "--memory-limit", "0GiB"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--context", 10**11), "context: 100000000000 is not usable: Input should be less than or equal to 16777216"),
        (("--concurrency", 10**20), "concurrency: 100000000000000000000 is not usable"),
        (("--lora-slots", 5, "--lora-rank", 5000), "finetuning.lora_rank: Input should be less than or equal to 512"),
        (("--lora-slots", 2000), "finetuning.lora_slots: Input should be less than or equal to 1024"),
    ],
)
def test_numbers_out_of_range_are_refused_by_show_too(options: tuple[object, ...], says: str) -> None:
    assert says in refusal("show", LLAMA, "--gpu", "MI300X", *options)


def test_a_memory_limit_no_engine_can_be_told_fits_nothing() -> None:
    said = refusal("show", LLAMA, "--gpu", "MI300X", "--memory-limit", "10MiB", code=1)
    assert "a memory limit of 10485760 bytes is less than an engine can be told to take" in said
