"""Every YAML file a person writes: what is wrong is one line with file, line, key and what was probably meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.errors import AimProfileError
from aim_profile.files import read as reading
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
UNCOMMON = ("<<: {a: 1}", "? [a]\n: 1", "a: =", "a: &x [1]\nb: *x", "!!str 1", "--- 1\n--- 2", "a: 2020-13-45")
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


@pytest.mark.parametrize(
    ("reader", "text", "says"),
    [
        (
            parse_workloads,
            "workloads:\n- {name: c, memory: 1GiB,\n   affinity: [d]}\n",
            "3: workloads[0].affinity: no workload",
        ),
        (
            parse_workloads,
            "workloads:\n- {name: c, memory: 1GiB}\n- {name: c, memory: 2GiB}\n",
            "3: workloads[1].name: 'c'",
        ),
        (
            parse_workloads,
            "workloads:\n- {name: b, memory: 1GiB}\n- {name: c, memory: 1GiB, affinity: [d]}\n"
            "- {name: d, memory: 1GiB, affinity: [c]}\n",
            "3: workloads[1].affinity: affinity goes in a circle",
        ),
        (parse_fleet, "nodes:\n- {name: a, gpu: MI300X}\n- {name: a, gpu: MI300X}\n", "3: nodes[1].name: 'a' names"),
        (
            parse_fleet,
            "nodes:\n- {name: a, gpu: MI300X, count: 3}\n- {name: a-1, gpu: MI300X}\n",
            "3: nodes[1].name: 'a-1'",
        ),
        (
            parse_fleet,
            f"nodes:\n- {{name: {'a' * 252}, gpu: MI300X, count: 3}}\n",
            "2: nodes[0]: name: with its number",
        ),
    ],
)
def test_what_contradicts_the_rest_of_the_file_has_its_line_too(reader: Reader, text: str, says: str):
    assert refusal(reader, text).startswith(f"f.yaml:{says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version: '1'\nnodes:\n- {name: a, gpu: MI300X}\n", "f.yaml:1: version: Input should be 1 (got '1')"),
        (
            "nodes:\n- {name: 2026-01-31, gpu: MI300X}\n",
            "f.yaml:2: nodes[0].name: Input should be a valid string (got 2026-01-31)",
        ),
    ],
)
def test_a_value_is_shown_as_it_was_written(text: str, says: str):
    assert refusal(parse_fleet, text) == says


@pytest.mark.parametrize("size", ["0GiB", "0.0 GB", "0B"])
def test_no_memory_at_all_is_no_amount(size: str):
    text = f"workloads:\n- {{name: g, memory: {size}, memory_limit: {size}}}\n"
    assert "workloads[0].memory: memory: " in refusal(parse_workloads, text)
    assert "less than a byte" in refusal(parse_workloads, text)


def test_memory_is_written_in_ascii():
    assert "not a memory size" in refusal(parse_workloads, "workloads:\n- {name: g, memory: \u0663GiB}\n")


@given(label=st.text(min_size=1, max_size=8).filter(lambda text: all(char.isprintable() for char in text)))
def test_json_with_its_characters_escaped_is_read_like_any_json(label: str):
    # json.dumps writes a character beyond U+FFFF as a surrogate pair, of which YAML knows nothing.
    body = {"version": 1, "nodes": [{"name": "a", "gpu": "MI300X", "labels": {"zone": f"\\{label}\U0001f600"}}]}
    (node,) = parse_fleet(json.dumps(body, indent=1)).nodes
    assert node.labels == (("zone", f"\\{label}\U0001f600"),)
    body["nodes"][0]["crads"] = 2
    assert refusal(parse_fleet, json.dumps(body, indent=1)).startswith("f.yaml:10: nodes[0].crads")


def test_a_file_without_an_end_is_refused_as_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MAX_FILE_BYTES", 1000)
    with pytest.raises(AimProfileError, match="/dev/zero: larger than"):
        reading.read_text(Path("/dev/zero"), AimProfileError)


@pytest.mark.parametrize(
    "text", ["", "a: [1, 01, 0x1F, 1_000, 1e3, .inf, ~, yes, 2020-01-01]\nb:\n- |\n  x\n- 'no'", *UNCOMMON]
)
def test_a_file_means_what_pyyaml_makes_of_it(text: str):
    try:
        wanted = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        with pytest.raises(AimProfileError, match="not YAML"):
            parse_yaml(text, "f.yaml", AimProfileError)
    else:
        assert repr(parse_yaml(text, "f.yaml", AimProfileError)) == repr(wanted)


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=4)


@settings(max_examples=40)
@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6))
def test_json_and_yaml_of_the_same_values_are_read_alike(value: object):
    for text in (json.dumps({"a": value}, ensure_ascii=False), yaml.safe_dump({"a": value}, allow_unicode=True)):
        assert parse_yaml(text, "f.yaml", AimProfileError) == {"a": value}


def test_json_that_says_a_thing_twice_or_no_number_is_read_as_yaml():
    with pytest.raises(AimProfileError, match=r"f\.yaml:2: b: given twice, first in line 1"):
        parse_yaml('{"b": 1,\n"b": 2}', "f.yaml", AimProfileError)
    assert parse_yaml('{"a": NaN, "b": 1e999}', "f.yaml", AimProfileError) == {"a": "NaN", "b": "1e999"}
