"""Every YAML file a person writes: what is wrong is one line with file, line, key and what was probably meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.errors import AimProfileError
from aim_profile.files.read import parse_yaml
from aim_profile.files.shape import MAX_DEPTH
from aim_profile.models.load import by_id
from aim_profile.nodes.emulated import emulate, export_node, parse_emulated
from aim_profile.plans.fleet import parse_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import dump_plan, parse_plan
from aim_profile.plans.workload import parse_workloads
from aim_profile.serving.derive import derive_from_id
from aim_profile.serving.files import read, write
from aim_profile.serving.profile import parse_id

FLEET = "version: 1\nnodes:\n- name: a\n  gpu: MI300X\n  cards: 2\n"
WORKLOADS = "version: 1\nworkloads:\n- name: w\n  model: Qwen/Qwen3-4B\n  replicas: 1\n"
SHORT_NODE = "version: 1\nname: a\ngpu: MI300X\ncards: 2\n"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
PROFILE = derive_from_id(LLAMA, parse_id("vllm-mi300x-fp8-tp1-latency"))

Reader = Callable[[str, str], object]
# (a good file, its reader, a key of it, how that key is misspelt, a wrong value for it)
FILES: dict[str, tuple[str, Reader, str, str, str]] = {
    "fleet": (FLEET, parse_fleet, "cards", "crads", "many"),
    "workloads": (WORKLOADS, parse_workloads, "replicas", "replica", "many"),
    "node": (SHORT_NODE, parse_emulated, "cards", "card", "many"),
    "exported node": (export_node(emulate("MI300X", 1)), parse_emulated, "gfx", "gfxx", "[]"),
    "plan": (dump_plan(make_plan(parse_fleet(FLEET), parse_workloads(WORKLOADS))), parse_plan, "tier", "tear", "best"),
    "profile": (write(PROFILE, "ours"), read, "precision", "precison", "fp7"),
    "AIM profile": (write(PROFILE, "aim"), read, "gpu_count", "gpu_counts", "x"),
    "unified profile": (write(PROFILE, "unified", by_id(LLAMA)), read, "variant_id", "variant_ids", "[]"),
}
EVERY_FILE = pytest.mark.parametrize(("good", "reader", "key", "misspelt", "wrong"), FILES.values(), ids=FILES)


def refusal(reader: Reader, text: str) -> str:
    with pytest.raises(AimProfileError) as refused:
        reader(text, "f.yaml")
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 500
    return said


def line_with(text: str, key: str) -> tuple[int, str]:
    """Number and text of the first line with that key, in YAML or JSON."""
    return next(
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.lstrip(' -"').startswith((f"{key}:", f'{key}":'))
    )


@EVERY_FILE
def test_the_files_are_good_and_have_the_key(good: str, reader: Reader, key: str, misspelt: str, wrong: str):
    reader(good, "f.yaml")
    assert line_with(good, key)


@EVERY_FILE
def test_a_key_given_twice(good: str, reader: Reader, key: str, misspelt: str, wrong: str):
    number, line = line_with(good, key)
    lines = good.splitlines()
    again = line.replace("- ", "  ", 1) if line.lstrip().startswith("- ") else line
    lines[number - 1] = line if line.rstrip().endswith((",", "{")) or '"' not in line else f"{line},"
    twice = "\n".join([*lines[:number], again, *lines[number:]])
    assert f"f.yaml:{number + 1}: {key}: given twice, first in line {number}" in refusal(reader, twice)


@EVERY_FILE
def test_a_misspelt_key(good: str, reader: Reader, key: str, misspelt: str, wrong: str):
    number, line = line_with(good, key)
    lines = good.splitlines()
    lines[number - 1] = line.replace(key, misspelt, 1)
    said = refusal(reader, "\n".join(lines))
    if key == "variant_id":  # what makes it a unified profile at all
        assert said.startswith("f.yaml:")
        return
    assert said.startswith(f"f.yaml:{number}: ")
    assert f"{misspelt}: unknown key; did you mean {key}?" in said


@EVERY_FILE
def test_a_value_of_another_type(good: str, reader: Reader, key: str, misspelt: str, wrong: str):
    number, line = line_with(good, key)
    lines = good.splitlines()
    before, colon, after = line.partition(":")
    quoted = f'"{wrong}"' if '"' in before and wrong.isalnum() else wrong
    lines[number - 1] = f"{before}{colon} {quoted}{',' if after.endswith(',') else ''}"
    said = refusal(reader, "\n".join(lines))
    assert said.startswith(f"f.yaml:{number}: ")
    assert key in said


@EVERY_FILE
@pytest.mark.parametrize("deep", ["[" * 100_000, "{a: " * 3_000, "- " * 100_000, "[" * 3_000 + "]" * 3_000])
def test_nesting_without_end(good: str, reader: Reader, key: str, misspelt: str, wrong: str, deep: str):
    """libyaml's composer recurses in C: 100,000 brackets would end the process."""
    assert f"f.yaml:1: nested more than {MAX_DEPTH} deep" in refusal(reader, deep)


@EVERY_FILE
@pytest.mark.parametrize(
    "text", ["", "[]", "7", "a: [", "\x00", "x: &a [*a]", "a: !!python/object:x y", "--- 1\n--- 2"]
)
def test_what_is_no_such_file_at_all(good: str, reader: Reader, key: str, misspelt: str, wrong: str, text: str):
    assert refusal(reader, text).startswith("f.yaml")


def test_aliases_of_aliases_are_counted_before_anything_is_built():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "stands for more than 20,000,000 values" in refusal(parse_fleet, "\n".join(lines))


def test_a_long_key_is_refused_in_a_line():
    assert "unknown key" in refusal(parse_fleet, f"{'k' * 1000}: 1\nnodes: [{{name: a, gpu: MI300X}}]")


def test_merge_keys_and_aliases_serve():
    text = "defaults: &d {gpu: MI300X, cards: 2}\nnodes:\n- {<<: *d, name: a}\n- {<<: *d, name: b, cards: 4}\n"
    nodes = parse_yaml(text, "f.yaml", AimProfileError)["nodes"]
    assert [node["cards"] for node in nodes] == [2, 4]


def lists_and_mappings(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner) | st.dictionaries(st.text(), inner)


@given(st.recursive(st.text(max_size=5) | st.integers(), lists_and_mappings))
def test_what_is_well_formed_is_read_as_yaml_reads_it(value: object):
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text, "f.yaml", AimProfileError) == yaml.safe_load(text)


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return found.exit_code, found.stderr


def test_files_in_each_other_s_place_are_told_apart(tmp_path: Path):
    fleet, workloads, plan = tmp_path / "fleet.yaml", tmp_path / "work.yaml", tmp_path / "plan.yaml"
    fleet.write_text(FLEET)
    workloads.write_text(WORKLOADS)
    plan.write_text(FILES["plan"][0])
    needs_fleet = "looks like a workloads file (workloads: …); a fleet file (nodes: …) is needed here"
    for code, said, expected in (
        (*run("plan", workloads, fleet), needs_fleet),
        (*run("plan", fleet, plan), "looks like a plan (placements: …); a workloads file"),
        (*run("assert", fleet), "looks like a fleet file (nodes: …); a plan (placements: …) is needed here"),
        (*run("diff", plan, workloads), "looks like a workloads file"),
        (*run("show", plan), "looks like a plan"),
        (*run("validate", fleet), "looks like a fleet file"),
    ):
        assert code == 2
        assert expected in said
        assert said.count("\n") == 1
