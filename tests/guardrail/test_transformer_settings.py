"""What ``python -m aim_guardrail`` refuses, how it says so, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aim_guardrail.policy import PolicyError
from aim_guardrail.settings import GuardrailSettings
from aim_kserve.settings import SettingsError


def load(*argv: str, **env: str) -> GuardrailSettings:
    return GuardrailSettings.load(argv, env, prog="aim-guardrail", description="")


def test_what_kserves_controller_injects_is_enough() -> None:
    flags = ["--model_name", "m", "--predictor_host", "m-predictor.ns", "--http_port", "8080", "--workers=2"]
    settings = load(*flags, "--protocol=v1")
    assert (settings.predictor_host, settings.speaks, settings.workers) == ("m-predictor.ns", "v1", 2)
    assert settings.read_policies().default.name == "chat"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--predictor_use_ssl"], "predictor_use_ssl is of a predictor, and there is no predictor_host"),
        (["--predictor_host", "http://x"], "without scheme"),
        (["--predictor_host", "x:99999"], "HOST:PORT"),
        (["--predictor_host", "x/y"], "without scheme and path"),
        (["--predictor_host", "x", "--predictor_protocol", "v3"], "v3"),
        (["--predictor_host", "x", "--protocol", "v2", "--predictor_protocol", "v1"], "differ"),
        (["--predictor_host", "x", "--predictor_connect_timeout_seconds", "0"], "greater than 0"),
        (["--predictor_host", "x", "--policy", "p.yaml", "--guardrails", "[]"], "both given"),
    ],
)
def test_bad_settings_are_named(argv: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        load(*argv)


def test_protocols_old_name_counts_alone() -> None:
    assert load("--predictor_host", "x", "--protocol", "grpc-v2").speaks == "grpc-v2"
    assert load("--predictor_host", "[::1]:80", "--predictor_protocol", "v2").speaks == "v2"


INLINE = """\
- {type: secrets, action: block}
- type: pii
  action: redact
  entities: [EMAIL_ADDRESS]
  threshold: 0.5
"""


def test_the_guardrails_annotation_is_a_policy_for_both_directions(tmp_path: Path) -> None:
    annotations = tmp_path / "annotations"
    escaped = INLINE.replace("\n", "\\n")
    annotations.write_text(f'aim.amd.com/guardrails="{escaped}"\naim.amd.com/profile="other"\n')
    policy = load("--predictor_host", "x", "--annotations_file", str(annotations)).read_policies().default
    assert policy.prompt == policy.answer
    assert [rule.action for rule in policy.prompt] == ["block", "redact"]
    indented = "".join(f"  {line}\n" for line in INLINE.splitlines())
    assert load("--predictor_host", "x", "--guardrails", indented).read_policies().default == policy


@pytest.mark.parametrize(
    ("inline", "where"),
    [
        (INLINE.replace("redact", "censor"), r"aim.amd.com/guardrails:4: prompt\[1\].action: 'censor'"),
        (INLINE.replace("threshold", "treshold"), r"aim.amd.com/guardrails:6: prompt\[1\].treshold: unknown key"),
        ("- {type: secrets", r"aim.amd.com/guardrails:\d: not valid YAML"),
        ("block: everything", r"aim.amd.com/guardrails:1: prompt: .*should be a list"),
        ("", r"aim.amd.com/guardrails:\d: "),
    ],
)
def test_a_wrong_annotation_is_named_by_line_and_key(inline: str, where: str) -> None:
    """Line 1 is the annotation's own."""
    with pytest.raises(PolicyError, match=where):
        load("--predictor_host", "x", "--guardrails", inline).read_policies()


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--help"], 0, "--predictor_host"),
        (["--no_such_flag"], 2, "--no_such_flag"),
        (["--predictor_host", ""], 2, "error: --predictor_host: must be HOST"),
        (["--predictor_host", "x", "--policy", "{bad}"], 1, "error: {bad}:3: answer[0].action: 'censor'"),
        (["--predictor_host", "x", "--policy", "/no/such/file"], 1, "error: /no/such/file: cannot be read"),
        (["--predictor_host", "x", "--policy", "x" * 300], 1, "cannot be read (File name too long)"),
    ],
)
def test_exit_codes(tmp_path: Path, argv: list[str], code: int, said: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nname: bad\nanswer: [{type: pii, action: censor}]\n")
    filled = [argument.replace("{bad}", str(bad)) for argument in argv]
    done = subprocess.run([sys.executable, "-m", "aim_guardrail", *filled], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert said.replace("{bad}", str(bad)) in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


def test_it_refuses_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys, aim_guardrail.__main__; print(sorted({'kserve', 'aiohttp', 'grpc', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
