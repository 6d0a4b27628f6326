"""`aim-runtime measure` against real servers: the runtime over the fake engine, and the embedded model."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from aim_profile.cli.app import app
from aim_profile.nodes.read import read_node
from aim_profile.serving.evidence import Measurement
from aim_profile.serving.evidence_files import read_evidence
from aim_runtime.measure import figures, hardware
from aim_runtime.measure.client import Client
from aim_runtime.measure.hardware import hardware_of, places
from aim_runtime.measure.node_dump import dump
from aim_runtime.measure.plot import draw
from aim_runtime.measure.verb import main
from served import Served
from sysfs_tree import MI300X, write_mi300x_cpx, write_sysfs_card

SAMPLE = Path(__file__).parents[2] / "docs/samples/smollm2-cpu.yaml"
SHORT = ("--level-seconds", "0.6", "--warm-up", "1", "--output-tokens", "constant:4", "--prompt-tokens", "constant:20")


@pytest.fixture(scope="module")
def server():
    with Served.fake(token_s=0.002) as running:
        yield running


@pytest.fixture(autouse=True)
def any_client_is_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted here does not hang on how busy the machine is."""
    monkeypatch.setattr(figures, "LAG_MS", 1e9)


def measured(folder: Path, *flags: str, url: str) -> Measurement:
    assert main(("--url", url, "--output", str(folder), "--plot", "none", *SHORT, *flags)) == 0
    (found,) = read_evidence(folder).measurements  # the same as YAML and as JSON
    return found


def test_an_open_loop_counts_every_request_and_token(server: Served, tmp_path: Path) -> None:
    found = measured(tmp_path, "--rates", "60,20", "--seed", "3", "--slo-ttft-ms", "60000", url=server.url)
    assert [point.offered for point in found.points] == [20, 60]
    assert (found.engine.name, found.engine.version, found.served_as) == ("fake", "1.2.3", "m")
    assert (found.load.arrivals, found.load.seed, found.load.warm_up) == ("poisson", 3, 1)
    assert found.load.requests == sum(point.answered for point in found.points)
    for point in found.points:
        assert point.failed == {}
        assert point.output_tokens == 4 * point.answered
        assert point.ttft_ms is not None
        assert point.e2e_ms is not None
        assert point.ttft_ms.p50 >= 2  # the engine takes 2 ms a token, so that no clock can say less
        assert point.e2e_ms.p50 >= 8
        assert point.goodput_per_s == pytest.approx(point.requests_per_s)
    # The fake engine's tokens are words: with its own `/tokenize` asked, each prompt is as long as it was to be.
    assert {point.prompt_tokens / point.answered for point in found.points} == {20}
    assert found.hardware.told_by == "node"
    again = measured(tmp_path / "again", "--rates", "20,60", "--seed", "3", url=server.url)
    assert again.load.prompts == found.load.prompts


def test_closed_loop_bursts_and_a_trace(server: Served, tmp_path: Path) -> None:
    closed = measured(tmp_path / "closed", "--concurrency", "1,3", url=server.url)
    assert closed.load.arrivals == "closed"
    assert all(point.answered for point in closed.points)
    bursts = measured(
        tmp_path / "b", "--arrivals", "on-off", "--on-s", "0.1", "--off-s", "0.1", "--rates", "30", url=server.url
    )
    assert bursts.load.arrivals == "on-off"
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(json.dumps({"t": n / 10, "prompt_tokens": 9, "output_tokens": 2}) + "\n" for n in range(100))
    )
    replayed = measured(tmp_path / "t", "--trace", str(trace), "--rates", "40", url=server.url)
    assert (replayed.load.arrivals, replayed.load.trace) == ("trace", "trace.jsonl")
    assert replayed.points[0].answered == 24  # 0.6 s of 40 a second
    assert replayed.points[0].output_tokens == 48


def test_chat_and_shared_prefixes(server: Served, tmp_path: Path) -> None:
    shared = ("--shared-prefix-tokens", "12", "--prefixes", "2")
    chat = measured(tmp_path, "--endpoint", "chat", "--rates", "30", *shared, url=server.url)
    assert chat.load.shared_prefix_tokens == 12
    assert chat.points[0].output_tokens == 4 * chat.points[0].answered


def test_failures_are_counted_by_kind(tmp_path: Path) -> None:
    with Served.fake(token_s=0.05, slots=1, max_waiting=1) as small:
        found = measured(tmp_path, "--rates", "40", url=small.url)
    (point,) = found.points
    assert point.failed["http 503"] > point.answered
    assert found.knee is None


async def test_a_refusal_has_its_status_code_and_time() -> None:
    body = {"prompt": "a", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    with Served.fake(token_s=0.2, slots=1, max_waiting=0) as small:
        async with Client(small.url, timeout_s=60) as client:
            found = await asyncio.gather(*(client.ask("/v1/completions", body, 0.0) for _ in range(3)))
            (wrong,) = await asyncio.gather(client.ask("/v1/completions", {**body, "max_tokens": "x"}, 0.0))
            (nowhere,) = await asyncio.gather(client.ask("/nowhere", body, 0.0))
    assert sorted(each.failed or "" for each in found) == ["", "http 503", "http 503"]
    refusals = [each.refusal for each in found if each.failed]
    assert [(each.status, each.code) for each in refusals if each] == [(503, "engine_full")] * 2
    assert all(each and each.retry_after_s is not None and each.retry_after_s >= 1 for each in refusals)
    assert wrong.refusal is not None
    assert (wrong.refusal.status, wrong.refusal.retry_after_s) == (400, None)
    assert nowhere.refusal is not None
    assert nowhere.refusal.status == 404


def test_a_request_that_takes_too_long_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Served.fake(token_s=0.3) as slow:
        flags = ("--output", str(tmp_path), "--plot", "none", *SHORT, "--warm-up", "0", "--timeout-seconds", "0.4")
        assert main(("--url", slow.url, *flags, "--rates", "5")) == 1
    assert "no request was answered (timeout)" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *flags: str, code: int) -> str:
    assert main(flags) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_measured_is_one_line(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output", str(tmp_path / "e"), "--plot", "none")
    assert "--url http://127.0.0.1:1" in refused(capsys, "--url", "http://127.0.0.1:1", *out, code=1)
    assert "--model x: no such model here; there are: m" in refused(
        capsys, "--url", server.url, "--model", "x", *out, code=1
    )
    assert "--rates 0" in refused(capsys, "--url", server.url, "--rates", "0", *out, code=2)
    (tmp_path / "t").write_text("{}\n")
    assert f"{tmp_path}/t:1: t or timestamp" in refused(
        capsys, "--url", server.url, "--trace", str(tmp_path / "t"), *out, code=2
    )
    file = tmp_path / "file"
    file.write_text("")
    elsewhere = ("--output", str(file / "x"), "--plot", "none")
    assert "name a folder" in refused(capsys, "--url", server.url, *elsewhere, code=2)
    assert "--profile" in refused(capsys, "--url", server.url, "--profile", str(file), *out, code=2)
    assert "the first request was not answered: http 400" in refused(
        capsys, "--url", server.url, "--prompt-tokens", "constant:5000", *out, code=1
    )
    assert not list((tmp_path / "e").iterdir())


def test_engines_side_by_side_are_asked_the_same(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Served.fake(token_s=0.004) as other:
        pair = f"fast={server.url},slow={other.url}"
        flags = ("--url", server.url, "--compare", pair, "--rounds", "2", "--output", str(tmp_path), *SHORT)
        assert main(flags) == 0
    assert "same text" in capsys.readouterr().out
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["fast", "slow"]
    assert [row["answered"] for row in rows] == [16, 16]
    assert [row["same_text"] for row in rows] == [1.0, 1.0]
    assert rows[0]["ratios"]["tokens_per_s"] == 1
    assert main(("--url", server.url, "--compare", "one", "--output", str(tmp_path))) == 2


def test_a_forwarded_port_and_another_machine_are_unknown_hardware(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardware.not_here(server.url) is None
    assert "is another machine" in (hardware.not_here("http://192.0.2.7:80") or "")
    assert "no process is seen" in (hardware.not_here("http://127.0.0.1:9") or "")
    monkeypatch.setattr(psutil.Process, "name", lambda _: "kubectl")
    assert "kubectl listens" in (hardware.not_here(server.url) or "")
    found = hardware_of(server.url, (), node=None, gpu_count=None, on_cpu=False)
    assert found.hardware.told_by == "unknown"


def test_an_emulation_file_says_what_a_server_elsewhere_runs_on(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("version: 1\ngpu: MI300X\ncards: 2\npartition: CPX/NPS4\n")
    text = 'aim_model_device_info{model_name="m",card="1",partition="3",compute_mode="CPX",memory_mode="NPS4"} 1.0\n'
    said = places(text, "m")
    assert [(each.card, each.partition) for each in said] == [(1, 3)]
    assert places(text, "other") == []
    found = hardware_of("http://192.0.2.7:80", said, node=file, gpu_count=None, on_cpu=False).hardware
    assert (found.told_by, found.gpu, found.partition, found.gpu_count) == ("file", "MI300X", "CPX/NPS4", 1)
    unsaid = hardware_of("http://192.0.2.7:80", (), node=file, gpu_count=None, on_cpu=False)
    assert (unsaid.hardware.told_by, "give --gpu-count" in unsaid.note) == ("unknown", True)


def test_the_plot_is_drawn_of_every_kind_of_point(server: Served, tmp_path: Path) -> None:
    found = measured(tmp_path, "--rates", "20,40", "--slo-ttft-ms", "500", "--slo-itl-ms", "50", url=server.url)
    points = (found.points[0], found.points[1].model_copy(update={"valid": False, "ttft_ms": None}))
    knee = {"offered": 20.0, "because": "x"}
    shown = Measurement.model_validate({**found.model_dump(), "points": points, "knee": knee})
    draw(shown, [tmp_path / "plot.svg", tmp_path / "plot.png"])
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_a_nodes_kernel_files_are_read_back_without_its_serial_numbers(tmp_path: Path) -> None:
    sys_folder = tmp_path / "machine/sys"
    nodes = sys_folder / "class/kfd/kfd/topology/nodes"
    write_mi300x_cpx(nodes, cards=2)
    write_sysfs_card(
        sys_folder / "bus/pci/drivers/amdgpu",
        "0000:05:00.0",
        vendor="0x1002",
        device=f"{MI300X['device_id']:#x}",
        current_compute_partition="CPX",
        current_memory_partition="NPS4",
        serial_number="SECRET",
    )
    assert dump(sys_folder, tmp_path / "report/sys") > 20
    before, after = read_node(tmp_path / "machine"), read_node(tmp_path / "report")
    assert [card.bdf for card in after.cards] == [card.bdf for card in before.cards]
    assert [card.partitions for card in after.cards] == [card.partitions for card in before.cards]
    assert [card.unique_id for card in before.cards] == [1000, 1001]
    assert max(card.unique_id or 0 for card in after.cards) < 10
    kept = "".join(file.read_text() for file in (tmp_path / "report").rglob("*") if file.is_file())
    assert "SECRET" not in kept


REPORT = (sys.executable, "-m", "aim_runtime.measure.node_report")


def test_a_machine_without_a_gpu_says_so(tmp_path: Path) -> None:
    (tmp_path / "sys/class").mkdir(parents=True)
    command = [*REPORT, "--root", str(tmp_path), "--model_dir", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no AMD GPU on this machine")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.model
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_of_a_report_ends_with_it(how: signal.Signals, embedded_model: Path, tmp_path: Path) -> None:
    command = [*REPORT, "--cpu", "--model_dir", str(embedded_model.parent), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    end = time.monotonic() + 60
    while not children and time.monotonic() < end and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.01)
    assert children
    process.send_signal(how)
    process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


@pytest.mark.model
def test_the_embedded_model_is_measured_and_its_profile_says_so(real: Served, tmp_path: Path) -> None:
    flags = ("--profile", str(SAMPLE), "--concurrency", "1", "--slo-ttft-ms", "60000")
    found = measured(tmp_path, *flags, url=real.url)
    assert (found.hardware.told_by, found.hardware.gpu) == ("node", "NONE")
    assert (found.engine.name, found.engine.args) == ("llama_cpp", {"max-model-len": 1024})
    (point,) = found.points
    assert point.output_tokens == 4 * point.answered
    shown = CliRunner().invoke(app, ["show", str(SAMPLE), "--evidence", str(tmp_path)]).stdout
    assert "unoptimized, measured" in shown
    assert f"engine     llama_cpp {found.engine.version}" in shown
    assert "max-model-len 1024 (here 8192)" in shown
