"""What docs/runtime.md says of settings is what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from aim_kserve.settings import annotation_of
from aim_profile.nodes.emulated import emulate, export_node
from aim_runtime.device_settings import DeviceSettings
from aim_runtime.dry_run import dry_run
from aim_runtime.settings import RuntimeSettings
from model_directory import write_model

PAGE = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]


def test_the_table_names_every_annotation_that_acts() -> None:
    fields = RuntimeSettings.model_fields.values()
    acting = {annotation for field in fields if (annotation := annotation_of(field))}
    told = {
        name for row in ROWS if not row.startswith("| `AIM_") for name in re.findall(r"`([a-z-]+)`", row.split("|")[1])
    }
    assert acting <= told


def test_every_flag_on_the_page_exists() -> None:
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z_-]+[a-z])", PAGE)}
    assert len(flags) > 20
    assert flags <= {*RuntimeSettings.model_fields, "no"}


def test_every_variable_of_aims_is_in_the_table() -> None:
    told = {name for row in ROWS if row.startswith("| `AIM_") for name in re.findall(r"AIM_[A-Z_]+", row.split("|")[1])}
    read = {"AIM_BASE_IMAGE_REF"}
    for name, field in DeviceSettings.model_fields.items():
        extra = field.json_schema_extra
        read |= {f"AIM_{name.upper()}", *(extra.get("env", ()) if isinstance(extra, dict) else ())}  # type: ignore[misc]
    assert len(told) == 17
    assert told <= read | {"AIM_ENGINE", "AIM_ENGINE_ARGS"}


def test_the_example_is_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = tmp_path / "node.yaml"
    node.write_text(export_node(emulate("MI300X", cards=2, partition="CPX/NPS4")))
    flags = ["--dry_run", "-o", "json", "--node", str(node), "--model_dir", str(write_model(tmp_path / "llama"))]
    assert dry_run(RuntimeSettings.load([*flags, "--model_name", "chat"], {}, prog="p", description="")) == 0
    printed = json.loads(capsys.readouterr().out)
    (example,) = re.findall(r"-o json .*?\n(\{.*?\n\})", PAGE, re.S)
    assert re.findall(r'^  "(\w+)":', example, re.M) == list(printed)
    for part in ("devices", "env"):
        (shown,) = re.findall(rf'"{part}": (.*),\n', example)
        assert json.loads(shown) == printed[part]
    for figure, shown in re.findall(r'"(\w+_gib)": ([0-9.]+)', example):
        assert printed["fit"][figure] == float(shown)
