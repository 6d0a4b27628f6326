"""Evidence speaks for the profiles of its own hardware, engine and precision, and for no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.gpus.catalog import by_name
from aim_profile.models.load import by_id
from aim_profile.serving.derive import Refusal, derive
from aim_profile.serving.evidence import Measurement
from aim_profile.serving.evidence_files import as_text, read_evidence
from aim_profile.serving.files import as_ours, read
from aim_profile.serving.profile import Profile, ProfileError
from aim_profile.serving.selection import Devices, select

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
ID = "vllm-mi300x-cpx-nps4-bf16-tp1-latency"
REFERENCE = f"{MODEL}/{ID}"


def body(**changed: Any) -> dict[str, Any]:
    """A measurement of REFERENCE; `hardware__gpu="MI325X"` changes what is inside."""
    percentiles = {"p50": 10.0, "p95": 20.0, "p99": 30.0}
    point = {
        "offered": 2.0,
        "duration_s": 30.0,
        "answered": 60,
        "requests_per_s": 2.0,
        "output_tokens_per_s": 128.0,
        "prompt_tokens": 7680,
        "output_tokens": 3840,
        "ttft_ms": percentiles,
        "itl_ms": percentiles,
        "e2e_ms": {"p50": 700.0, "p95": 800.0, "p99": 900.0},
        "goodput_per_s": 1.9,
    }
    made: dict[str, Any] = {
        "version": 1,
        "model": MODEL,
        "served_as": "chat",
        "precision": "bf16",
        "hardware": {"told_by": "node", "gpu": "MI300X", "partition": "CPX/NPS4", "gpu_count": 1, "driver": "6.12.12"},
        "engine": {"name": "vllm", "version": "0.32.0", "args": {"max-num-seqs": 4}},
        "load": {
            "generator": "aim-runtime measure",
            "arrivals": "poisson",
            "prompt_tokens": "constant:128",
            "output_tokens": "constant:64",
            "prompts": "sha256:0123",
            "seed": 1,
            "warm_up": 2,
            "requests": 120,
            "duration_s": 60.0,
        },
        "slo": {"ttft_ms": 200.0},
        "points": [point, {**point, "offered": 4.0, "ttft_ms": {"p50": 10.0, "p95": 300.0, "p99": 400.0}}],
        "knee": {"offered": 2.0, "because": "TTFT p95 crosses 200 ms at 4"},
        "command": "aim-runtime measure --url http://127.0.0.1:8080",
        "date": "2026-01-02T03:04:05+00:00",
        "tool": "aim-kserve 0.1.0",
    }
    for name, value in changed.items():
        *outer, last = name.split("__")
        inside = made
        for part in outer:
            inside = inside[part]
        inside[last] = value
    return made


def measurement(**changed: Any) -> Measurement:
    return Measurement.model_validate(body(**changed))


def profile(mode: str = "CPX/NPS4", gpu: str = "MI300X") -> Profile:
    found = derive(by_id(MODEL), by_name(gpu).mode(mode))
    assert not isinstance(found, Refusal)
    return found


def written(folder: Path, name: str = "evidence.yaml", **changed: Any) -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump({"measurements": [body(**changed)]}), encoding="utf-8")
    return file


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_a_profile_that_carries_figures_of_its_own_is_measured() -> None:
    found = profile().carrying([measurement(), measurement()])
    assert found.evidence.measured
    assert found.evidence.measurements == (measurement(),)
    assert found.standing == "validated, measured"
    assert not any("not measured" in note for note in found.evidence.notes)
    assert read(as_ours(found)) == found


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "meta-llama/Llama-3.1-70B-Instruct"}, "model"),
        ({"engine__name": "llama_cpp"}, "engine.name"),
        ({"precision": "fp8"}, "precision"),
        ({"precision": None}, "precision"),
        ({"hardware__gpu": "MI325X"}, "hardware.gpu"),
        ({"hardware__partition": "SPX/NPS1"}, "hardware.partition"),
        ({"hardware__alloc_mode": "ALL"}, "hardware.alloc_mode"),
        ({"hardware__gpu_count": 2}, "hardware.gpu_count"),
        ({"hardware__told_by": "unknown"}, "hardware.told_by"),
        ({"hardware": {"told_by": "node", "cpu": "EPYC", "cores": 8}}, "hardware.gpu"),
    ],
)
def test_figures_of_something_else_speak_for_nothing(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    other = measurement(**change)
    mismatch = other.mismatch(profile().subject)
    assert mismatch is not None
    assert mismatch.field == field
    assert not profile().carrying([other]).evidence.measured
    file = written(tmp_path, **change)
    with pytest.raises(ProfileError, match=rf"evidence.yaml: measurements\[0\].{field}: .*; give evidence measured"):
        read_evidence(file).on(profile())
    inside = yaml.safe_load(as_ours(profile()))
    inside["evidence"] = {"measurements": [body(**change)]}
    with pytest.raises(ProfileError, match=rf"evidence\.measurements\[0\]\.{field}: .*, the profile is for "):
        read(yaml.safe_dump(inside))


def test_a_directory_holds_a_fleets_evidence(tmp_path: Path) -> None:
    written(tmp_path, "a.yaml")
    written(tmp_path, "b.json", hardware__gpu="MI325X")
    (tmp_path / "node.yaml").write_text("node: a\n", encoding="utf-8")
    known = read_evidence(tmp_path)
    assert len(known.measurements) == 2
    assert known.on(profile()).evidence.measurements == (measurement(),)
    whole = known.on(profile("SPX/NPS1"))
    assert not whole.evidence.measured
    assert "hardware.partition CPX/NPS4, this is SPX/NPS1" in (known.passed_over(whole) or "")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"hardware__gpux": "MI300X"}, "gpux: unknown key; did you mean gpu"),
        ({"hardware__gpu": "MI9"}, "gpu MI9 is not in the catalogue"),
        ({"hardware__partition": None}, "gpu MI300X needs partition"),
        ({"hardware__partition": "CPX/NPS3"}, "NPS3"),
        ({"date": "2026-01-02T03:04:05"}, "date: .*timezone"),
        ({"points": []}, "points: "),
    ],
)
def test_a_file_that_is_not_well_formed_is_refused_with_its_line(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ProfileError, match=rf"evidence.yaml:\d+: .*{says}"):
        read_evidence(written(tmp_path, **change))


def test_a_claim_without_figures_is_refused() -> None:
    text = as_ours(profile()).replace("measured: false", "measured: true")
    with pytest.raises(ProfileError, match=r"evidence\.measured: true, but measurements has none"):
        read(text)
    assert not read(as_ours(profile())).evidence.measured


def test_no_percentile_is_below_a_lower_one(tmp_path: Path) -> None:
    wrong = body()
    wrong["points"][0]["ttft_ms"] = {"p50": 3.0, "p95": 2.0, "p99": 5.0}
    with pytest.raises(ValueError, match="percentiles must rise"):
        Measurement.model_validate(wrong)


def test_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(as_text([measurement()]), encoding="utf-8")
    assert read_evidence(file).measurements == (measurement(),)


def test_selection_says_who_is_measured_and_keeps_its_order() -> None:
    devices = Devices(by_name("MI300X").mode("CPX/NPS4"))
    before = select(by_id(MODEL), devices)
    after = select(by_id(MODEL), devices, measurements=[measurement()])
    assert [each.reference for each in after.judged] == [each.reference for each in before.judged]
    assert {each.reference for each in after.judged if each.measured} == {REFERENCE}
    assert after.chosen is not None
    assert after.chosen.evidence.measured
    assert not any(each.measured for each in before.judged)


def test_show_says_measured_with_the_figures(tmp_path: Path) -> None:
    plain = run("show", REFERENCE).stdout
    assert "unoptimized, not measured" in plain
    shown = run("show", REFERENCE, "--evidence", written(tmp_path)).stdout
    assert "unoptimized, measured" in shown
    assert "Measured 2026-01-02" in shown
    assert "knee     2 offered req/s: TTFT p95 crosses 200 ms at 4" in shown
    assert "on       1 x MI300X CPX/NPS4, driver 6.12.12" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.lstrip().startswith("* 2")]
    assert row == ["*", "2", "60", "0", "2", "128", "1.9", *("10", "20", "30") * 2, "700", "800", "900"]


def test_verbs_take_evidence(tmp_path: Path) -> None:
    written(tmp_path)
    lines = run("list", "--model", MODEL, "--precision", "bf16", "--evidence", tmp_path).stdout
    assert "validated, measured" in lines
    assert run("list", "--model", MODEL, "--precision", "bf16", "-o", "json").stdout.count('"measured": true') == 0
    options = ("--gpu", "MI300X", "--partition", "CPX/NPS4", "--evidence", tmp_path)
    chosen = json.loads(run("select", MODEL, *options, "-o", "json").stdout)
    assert chosen["measured"] is True
    assert read(run("export", REFERENCE, "--evidence", tmp_path).stdout).evidence.measured


def test_evidence_of_other_hardware_is_one_line(tmp_path: Path) -> None:
    file = written(tmp_path, hardware__gpu="MI325X")
    refused = run("show", REFERENCE, "--evidence", file)
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert f"measurements[0].hardware.gpu: MI325X, {REFERENCE} is for MI300X; give evidence measured there" in line
    passed = run("show", REFERENCE, "--evidence", tmp_path)
    assert passed.exit_code == 0
    assert "not measured" in passed.stdout
    assert "hardware.gpu MI325X, this is MI300X" in passed.stderr
    (tmp_path / "empty").mkdir()
    assert "no evidence in it" in run("show", REFERENCE, "--evidence", tmp_path / "empty").stderr


def test_a_cpus_profile_can_be_measured(tmp_path: Path) -> None:
    sample = Path(__file__).parents[2] / "docs/samples/smollm2-cpu.yaml"
    hardware = {"told_by": "node", "cpu": "AMD EPYC 9B14", "cores": 2}
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    file = written(tmp_path, model=model, engine__name="llama_cpp", precision="int4", hardware=hardware)
    shown = run("show", sample, "--evidence", file).stdout
    assert "devices       processors" in shown
    assert "unoptimized, measured" in shown
    assert "on       AMD EPYC 9B14, 2 cores" in shown


def test_a_plan_says_which_of_its_replicas_were_measured(tmp_path: Path) -> None:
    fleet, workloads = tmp_path / "node.yaml", tmp_path / "workloads.yaml"
    fleet.write_text("version: 1\ngpu: MI300X\ncards: 1\npartition: CPX/NPS4\n", encoding="utf-8")
    wanted = {"name": "chat", "model": MODEL, "precision": "bf16", "context": 8192, "concurrency": 1, "replicas": 2}
    workloads.write_text(yaml.safe_dump({"version": 1, "workloads": [wanted]}), encoding="utf-8")
    folder = tmp_path / "evidence"
    folder.mkdir()
    file = written(folder)
    plan = run("plan", fleet, workloads, "--evidence", folder)
    assert "measured  2 of 2 replicas: chat/0, chat/1" in plan.stdout
    written(folder, hardware__gpu="MI325X")
    assert "measured  0 of 2 replicas: none" in run("plan", fleet, workloads, "--evidence", folder).stdout
    refused = run("plan", fleet, workloads, "--evidence", file)
    assert refused.exit_code == 2
    assert "measurements[0].hardware.gpu: MI325X, chat/0 is for MI300X" in refused.stderr
    assert "measured  " not in run("plan", fleet, workloads).stdout
