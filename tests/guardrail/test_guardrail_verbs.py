"""The verbs: a text checked, policies read, families judged on labelled texts, as their users call them."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aim_guardrail.cli import bench, catalog, check, evaluate, policy
from aim_guardrail.cli.given import MAX_BYTES
from aim_guardrail.cli.reliability import bins
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.policy import shipped_names
from aim_guardrail.policy.policy import Rule
from aim_guardrail.policy.schema import policy_schema

KEY = "AK" + "IAQ3EGRBL7JX2VWP5M"
Out = pytest.CaptureFixture[str]


def said(main: Callable[[list[str]], int], capsys: Out, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


# --- check ----------------------------------------------------------------------------------------------------------


def test_a_text_is_checked_as_the_server_would(capsys: Out):
    code, out, _ = said(check.main, capsys, "mail bob@example.com", "-o", "json")
    found = json.loads(out)
    assert (code, found["action"], found["text"]) == (1, "redact", "mail <EMAIL_ADDRESS_1>")
    assert [(f["family"], f["label"], f["start"], f["end"]) for f in found["findings"]] == [
        ("pii", "EMAIL_ADDRESS", 5, 20)
    ]


def test_a_block_shows_no_text(capsys: Out):
    code, out, _ = said(check.main, capsys, f"the key is {KEY}", "-o", "json")
    assert (code, json.loads(out)["action"], json.loads(out)["text"]) == (1, "block", None)
    assert KEY not in out


def test_what_passes_is_0_and_one_line(capsys: Out):
    code, out, _ = said(check.main, capsys, "good morning")
    assert (code, out.count("\n")) == (0, 1)
    assert out.startswith("allow by policy chat (")


def test_standard_input_is_read(capsys: Out, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"answer: {KEY}".encode())))
    code, out, _ = said(check.main, capsys, "-", "--direction", "answer")
    assert (code, "<SECRET_1>" in out, KEY in out) == (1, True, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("x", "--policy", "nope"), "no shipped policy is named 'nope': use one of batch, chat"),
        (("x", "--policy", "nope.yaml"), "nope.yaml: cannot be read (No such file or directory)"),
        (("x", "--policy", "n" * 300), "no shipped policy is named"),
    ],
)
def test_a_policy_that_is_none_is_one_line(argv: tuple[str, ...], message: str, capsys: Out):
    code, out, err = said(check.main, capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_direction_without_rules_is_refused(capsys: Out, tmp_path: Path):
    (tmp_path / "p.yaml").write_text("version: 1\nname: a\nprompt: [{type: pii, action: flag}]\n")
    code, _, err = said(check.main, capsys, "x", "--policy", str(tmp_path / "p.yaml"), "--direction", "answer")
    assert (code, err) == (2, "error: the policy 'a' has no rules for the answer: choose the other\n")


# --- catalog, policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["secrets", "pii", "code", "injection", "toxicity"])
def test_the_catalog_has_the_thresholds_of_a_rule_without_options(capsys: Out, family: str):
    (told,) = json.loads(said(catalog.main, capsys, family, "-o", "json")[1])["families"]
    rule = Rule.model_validate({"type": family, "action": "flag"})
    assert {name: label["threshold"] for name, label in told["labels"].items()} == {
        name: label.threshold for name, label in rule.known.items()
    }


def test_the_catalog_names_every_family_and_label(capsys: Out):
    code, out, _ = said(catalog.main, capsys)
    assert code == 0
    for family in FAMILIES.values():
        assert family.name in out
        assert all(label in out for label in family.labels)
    told = json.loads(said(catalog.main, capsys, "-o", "json")[1])
    assert [family["type"] for family in told["families"]] == list(FAMILIES)
    assert [each["name"] for each in told["policies"]] == shipped_names()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_tells_its_options(family: str, capsys: Out):
    code, out, _ = said(catalog.main, capsys, family)
    assert code == 0
    assert all(name in out for name in FAMILIES[family].options.model_fields) or "no options" in out


def test_policies_are_validated_each(capsys: Out, tmp_path: Path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("version: 2\nname: good\nprompt: [{type: pii, action: {CREDIT_CARD: block, default: log}}]\n")
    bad.write_text("version: 2\nname: bad\nprompt: [{type: pii, action: nothing}]\n")
    code, out, err = said(policy.main, capsys, "validate", str(good), str(bad))
    assert code == 1
    assert out.startswith(f"{good}: good (")
    assert err.startswith(f"error: {bad}:3: prompt[0].action: 'nothing' is not allowed")
    assert said(policy.main, capsys, "validate", str(good))[0] == 0
    code, _, err = said(policy.main, capsys, "validate", "n" * 300)
    assert (code, "cannot be read (File name too long)" in err) == (1, True)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_policy_is_explained(name: str, capsys: Out):
    code, out, _ = said(policy.main, capsys, "explain", name)
    assert code == 0
    assert out.startswith(f"{name} (")
    assert "at once: secrets " in out


def test_what_a_rule_may_do_besides_is_explained(capsys: Out, tmp_path: Path):
    file = tmp_path / "p.yaml"
    file.write_text("version: 2\nname: a\nanswer: [{type: pii, action: log, on_error: open, required: true}]\n")
    out = said(policy.main, capsys, "explain", str(file))[1]
    assert "prompt: not checked" in out
    assert "nothing passes without it; a failure: it passes, marked degraded" in out


def test_the_schema_is_printed(capsys: Out):
    assert json.loads(said(policy.main, capsys, "schema")[1]) == policy_schema()


# --- eval, bench ----------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    texts = [("mail bob@example.com", "EMAIL_ADDRESS"), ("4111 1111 1111 1111", ["CREDIT_CARD"]), (KEY, "secrets")]
    texts += [("bob at home", "pii")]  # missed
    texts += [(f"harmless {word}", "none") for word in ["one", "two", "three", "four", "five", "six"]]
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))
    return file


def test_each_family_is_judged_with_its_interval(labelled: Path, capsys: Out):
    code, out, _ = said(evaluate.main, capsys, str(labelled), "--policy", "values", "-o", "json")
    secrets, pii = json.loads(out)
    assert (code, secrets["rule"], secrets["held"], secrets["free"]) == (0, "secrets", 1, 9)
    assert (pii["held"], pii["free"], pii["tpr"]["value"], pii["fpr"]["value"]) == (3, 7, 0.6667, 0.0)
    assert pii["tpr"]["low"] == pytest.approx(0.2077, abs=1e-4)  # Wilson, 2 of 3
    assert pii["auc"]["value"] == pytest.approx((2 + 0.5) / 3, abs=1e-4)


def test_csv_says_the_same(labelled: Path, tmp_path: Path, capsys: Out):
    file = tmp_path / "texts.csv"
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    said_by = ["|".join(row["label"]) if isinstance(row["label"], list) else row["label"] for row in rows]
    file.write_text(
        "text,label\n" + "".join(f'"{row["text"]}",{label}\n' for row, label in zip(rows, said_by, strict=True))
    )
    figures = [
        [
            {k: v for k, v in row.items() if "ms" not in k}
            for row in json.loads(said(evaluate.main, capsys, str(f), "--policy", "values", "-o", "json")[1])
        ]
        for f in (labelled, file)
    ]
    assert figures[0] == figures[1]


def test_one_family_takes_yes_and_no(tmp_path: Path, capsys: Out):
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a@example.com", "label": true}\n{"text": "nothing", "label": 0}\n')
    code, _, err = said(evaluate.main, capsys, str(file))
    assert (code, "need one rule: --family" in err) == (2, True)
    code, out, _ = said(evaluate.main, capsys, str(file), "--family", "pii", "--plot", str(tmp_path / "r.svg"))
    assert (code, "100.0 %" in out) == (0, True)
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_scores_and_truth_are_binned():
    assert bins([0.05, 0.05, 0.95, 1.0], [False, True, True, True]) == [(0.05, 0.5, 2), (0.975, 1.0, 2)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file holds no text"),
        ("{", "line 1: no JSON"),
        (" " * (MAX_BYTES + 1) + "{", "has a line of more than"),
        ('{"text": "a"}', "t.jsonl:1: needs text and label"),
        ('{"text": "a", "label": "EMAIL"}', "label 'EMAIL' is none of"),
    ],
)
def test_a_file_that_cannot_be_judged_is_one_line(content: str, message: str, tmp_path: Path, capsys: Out):
    (tmp_path / "t.jsonl").write_text(content)
    code, _, err = said(evaluate.main, capsys, str(tmp_path / "t.jsonl"))
    assert (code, err.count("\n"), message in err) == (2, 1, True)


def test_what_rules_cost_is_measured(capsys: Out):
    code, out, _ = said(bench.main, capsys, "--policy", "values", "--texts", "3", "-o", "json")
    rows = json.loads(out)
    assert (code, [row["text"] for row in rows]) == (
        0,
        ["50 characters", "500 characters", "4000 characters", "500, six values"],
    )
    assert all(0 < row["cpu_p50"] <= row["cpu_p95"] for row in rows)
    assert [len(text) for chars in bench.LENGTHS for text in bench.texts(chars, 2, values=chars > 200)] == [
        50,
        50,
        500,
        500,
        4000,
        4000,
    ]


def test_verbs_are_dispatched_and_told():
    run = [sys.executable, "-m", "aim_guardrail"]
    assert subprocess.run([*run, "policy", "explain", "chat"], capture_output=True, check=True).stdout.startswith(
        b"chat ("
    )
    absent = subprocess.run([*run, "audit", "verify", "no-such-file"], capture_output=True, check=False)
    assert absent.returncode != 0
    assert b"no-such-file" in absent.stderr + absent.stdout
    unknown = subprocess.run([*run, "chek"], capture_output=True, check=False)
    assert (unknown.returncode, unknown.stderr.startswith(b"error: 'chek' is no verb: give check, ")) == (2, True)
    helped = subprocess.run([*run, "--help"], capture_output=True, check=True).stdout.decode()
    assert all(f"aim-guardrail {verb}" in helped for verb in ("audit", "check", "catalog", "policy", "eval", "bench"))
