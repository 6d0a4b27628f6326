"""Settings: flags over environment over annotations over defaults, and nothing unknown."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from aim_kserve.settings import ServerSettings, SettingsError, parse_downward_api


class Settings(ServerSettings):
    length: int = Field(1, ge=1, json_schema_extra={"annotation": "max-model-len"})
    loud: bool = False


def load(*argv: str, annotations: str | None = None, tmp_path: Path | None = None, **env: str) -> Settings:
    if annotations is not None:
        assert tmp_path is not None
        file = tmp_path / "annotations"
        file.write_text(annotations)
        argv = ("--annotations_file", str(file), *argv)
    return Settings.load(argv, env, prog="test", description="")


def test_precedence(tmp_path: Path) -> None:
    annotations = 'aim.amd.com/max-model-len="2"'
    assert load().length == 1
    assert load(annotations=annotations, tmp_path=tmp_path).length == 2
    assert load(annotations=annotations, tmp_path=tmp_path, AIM_LENGTH="3").length == 3
    assert load("--length", "4", annotations=annotations, tmp_path=tmp_path, AIM_LENGTH="3").length == 4


@pytest.mark.parametrize(
    ("argv", "loud"), [([], False), (["--loud"], True), (["--loud", "false"], False), (["--loud=true"], True)]
)
def test_booleans(argv: list[str], loud: bool) -> None:
    assert load(*argv).loud is loud


def test_kserves_flags_in_both_spellings() -> None:
    settings = load("--http-port", "1", "--grpc_port", "2", "--model_name", "m", "--workers=3", "--enable_grpc=false")
    assert (settings.http_port, settings.grpc_port, settings.model_name, settings.workers) == (1, 2, "m", 3)
    assert settings.enable_grpc is False


def test_an_unknown_flag_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--lenght", "2")
    assert caught.value.code == 2
    assert "--lenght" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"AIM_LENGHT": "2"}, "environment AIM_LENGHT: unknown setting"),
        ({"AIM_LENGTH": "two"}, "environment AIM_LENGTH: .*got 'two'"),
        ({"AIM_LENGTH": "0"}, "environment AIM_LENGTH: .*greater than or equal to 1"),
    ],
)
def test_wrong_environment(env: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(**env)


def test_kubernetes_service_links_are_not_settings() -> None:
    """A Service called ``aim-length`` in the namespace must not stop every pod of ours."""
    links = {
        "AIM_LENGTH_SERVICE_HOST": "10.0.0.1",
        "AIM_LENGTH_SERVICE_PORT": "80",
        "AIM_LENGTH_SERVICE_PORT_HTTP": "80",
        "AIM_LENGTH_PORT": "tcp://10.0.0.1:80",
        "AIM_LENGTH_PORT_80_TCP": "tcp://10.0.0.1:80",
        "AIM_LENGTH_PORT_80_TCP_ADDR": "10.0.0.1",
        "AIM_HTTP_PORT": "tcp://10.0.0.1:80",  # a Service called aim-http
    }
    settings = load(**links)
    assert (settings.length, settings.http_port) == (1, 8080)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('aim.amd.com/max-model-length="2"', "annotation aim.amd.com/max-model-length: unknown; known under"),
        ('aim.amd.com/max-model-len="two"', "annotation aim.amd.com/max-model-len: .*got 'two'"),
        ("aim.amd.com/max-model-len=2", "line 1: not of the form"),
        ('\n\nkey="bad\\q"', "line 3: not of the form"),
    ],
)
def test_wrong_annotations(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        load(annotations=text, tmp_path=tmp_path)


def test_annotations_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "annotations").write_bytes(b'key="caf\xe9"')
    with pytest.raises(SettingsError, match="annotations: not UTF-8 at byte 8: give a UTF-8 file"):
        load("--annotations_file", str(tmp_path / "annotations"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = str(folder / "tls.crt"), str(folder / "tls.key")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*command, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


def test_certificates_are_tried_at_once(pair: tuple[str, str], tmp_path: Path) -> None:
    certificate, key = pair
    assert load("--ssl_certfile", certificate, "--ssl_keyfile", key).ssl_keyfile == Path(key)
    both = tmp_path / "both.pem"
    both.write_text(Path(certificate).read_text() + Path(key).read_text())
    assert load("--ssl_certfile", str(both)).ssl_certfile == both


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--ssl_certfile", "/none"], "--ssl_certfile: cannot be read .No such file.*got '/none'"),
        (["--ssl_certfile", "/"], "--ssl_certfile: cannot be read .Is a directory"),
        (["--ssl_certfile", "{certificate}", "--ssl_keyfile", "/none"], "--ssl_keyfile: cannot be read"),
        (["--ssl_keyfile", "{key}"], "--ssl_keyfile: a key without its certificate: give --ssl_certfile"),
        (["--ssl_certfile", "{certificate}"], "--ssl_keyfile: does not hold the unencrypted key of --ssl_certfile"),
        (["--ssl_certfile", "{key}", "--ssl_keyfile", "{key}"], "--ssl_keyfile: does not hold the unencrypted key"),
    ],
)
def test_wrong_certificates_are_one_line(pair: tuple[str, str], argv: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        load(*(argument.format(certificate=pair[0], key=pair[1]) for argument in argv))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("origins", ["https://a.example/", "a.example", "https://a.example/path", "*.example", "null"])
def test_what_no_browser_calls_an_origin_is_refused(origins: str) -> None:
    with pytest.raises(SettingsError, match=r"--cors_origins: .* is no origin: give scheme://host"):
        load("--cors_origins", f"http://localhost:3000, {origins}")


def test_origins_are_a_list() -> None:
    assert load().cors_origins == ()
    assert load("--cors_origins", "https://a.b, http://[::1]:3000").cors_origins == ("https://a.b", "http://[::1]:3000")


def test_annotations_of_other_processes_and_others_are_left_alone(tmp_path: Path) -> None:
    text = 'aim.amd.com/guardrails="- type: pii"\nprometheus.io/scrape="true"\n'
    assert load(annotations=text, tmp_path=tmp_path) == load(annotations="", tmp_path=tmp_path)


def test_a_missing_annotations_file_is_an_error_only_when_named(tmp_path: Path) -> None:
    assert load().length == 1
    with pytest.raises(SettingsError, match="nowhere: no such file"):
        load("--annotations_file", str(tmp_path / "nowhere"))


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9./-]{0,20}", fullmatch=True), st.text(st.characters(codec="utf-8"))))
def test_annotations_survive_the_kubelets_quoting(annotations: dict[str, str]) -> None:
    """Go's ``%q`` escapes quotes, backslashes and control characters as JSON does (for what Kubernetes allows)."""
    import json

    text = "\n".join(f"{key}={json.dumps(value)}" for key, value in annotations.items())
    assert dict(parse_downward_api(text, Path("x"))) == annotations


def test_annotations_alone_are_read_as_at_the_start_of_a_pod() -> None:
    assert Settings.of_annotations({"aim.amd.com/max-model-len": "512", "other": "x"}).length == 512
    with pytest.raises(SettingsError, match=r"annotation aim.amd.com/max-model-len: .*integer.* \(got 'lots'\)"):
        Settings.of_annotations({"aim.amd.com/max-model-len": "lots"})
    with pytest.raises(SettingsError, match=r"annotation aim.amd.com/nonsense: unknown"):
        Settings.of_annotations({"aim.amd.com/nonsense": "1"})
