"""What a run tells of itself, in each place that it is told in."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
from rich.console import Console

from aim_trainer.job.job import FineTuningJob
from aim_trainer.metrics import kubeflow, published, sinks
from aim_trainer.metrics.all_sinks import AllSinks
from aim_trainer.metrics.json_lines import JsonLines, read_records
from aim_trainer.metrics.kubeflow import Kubeflow
from aim_trainer.metrics.progress import Progress
from aim_trainer.metrics.prometheus import Prometheus
from aim_trainer.metrics.records import Evaluation, Note, Record, Saved, Step
from aim_trainer.metrics.terminal import Bar, Lines
from aim_trainer.metrics.words import bytes_in_words, seconds_in_words
from aim_trainer.run_directory import RunDirectory


def step(at: int, steps: int = 40, loss: float = 2.0, memory: int | None = None) -> Step:
    return Step(
        step=at,
        steps=steps,
        epoch=at / 20,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens=1000,
        trained_tokens=300,
        seconds=0.5,
        eta_s=(steps - at) * 0.5,
        gpu_memory_bytes=memory,
    )


ALL: list[Record] = [
    Note("started", "8 rows", {"rows": 8}),
    Evaluation(0, {"eval_loss": 2.5, "perplexity": 12.2}),
    step(1),
    step(2, memory=4096),
    Saved(2, "file:///run/checkpoints/step-000002", 2048, 0.25),
    Evaluation(2, {"eval_loss": 2.25}),
]


def records(file: Path) -> list[Record]:
    return [told.record for told in read_records(file)]


class TestJsonLines:
    def test_what_was_told_is_read_again(self, tmp_path: Path) -> None:
        file = tmp_path / "run/metrics.jsonl"
        told = JsonLines(file)
        for count, record in enumerate(ALL, 1):
            told.tell(record)
            assert len(file.read_bytes().splitlines()) == count, "each line is there at once"
        assert records(file) == ALL

    def test_a_file_that_is_not_there_has_no_records(self, tmp_path: Path) -> None:
        assert records(tmp_path / "metrics.jsonl") == []

    def test_a_resumed_run_tells_a_step_once(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        first = JsonLines(file)
        for at in range(1, 6):
            first.tell(step(at, loss=9.0))
        first.tell(Evaluation(3, {"eval_loss": 3.0}))
        first.tell(Evaluation(5, {"eval_loss": 5.0}))
        resumed = JsonLines(file)
        resumed.tell(Note("resumed", "from step 3"))
        for at in range(4, 7):
            resumed.tell(step(at, loss=1.0))
        assert [(r.step, r.loss) for r in records(file) if isinstance(r, Step)] == [
            (1, 9.0),
            (2, 9.0),
            (3, 9.0),
            (4, 1.0),
            (5, 1.0),
            (6, 1.0),
        ]
        assert [r.step for r in records(file) if isinstance(r, Evaluation)] == [3]
        assert Note("resumed", "from step 3") in records(file)

    @pytest.mark.parametrize("cut", range(1, 60, 7))
    def test_a_line_that_was_torn_by_a_kill_costs_itself_alone(self, tmp_path: Path, cut: int) -> None:
        file = tmp_path / "metrics.jsonl"
        first = JsonLines(file)
        for at in (1, 2, 3):
            first.tell(step(at))
        file.write_bytes(file.read_bytes()[:-cut])
        assert records(file) == ([step(1), step(2)] if cut > 1 else [step(1), step(2), step(3)])
        again = JsonLines(file)
        again.tell(Note("resumed", "from step 2"))
        again.tell(step(3))
        assert records(file) == [step(1), step(2), Note("resumed", "from step 2"), step(3)]

    @pytest.mark.parametrize(
        "line", [b"", b"[]", b"7", b'{"record": "step"}', b'{"record": "x", "time": 1}', b"\xff\x00"]
    )
    def test_a_line_that_is_no_record_is_passed_over(self, tmp_path: Path, line: bytes) -> None:
        file = tmp_path / "metrics.jsonl"
        JsonLines(file).tell(step(1))
        file.write_bytes(line + b"\n" + file.read_bytes() + line + b"\n")
        assert records(file) == [step(1)]

    @pytest.mark.parametrize(
        "odd",
        [
            *({"step": 2, "steps": steps} for steps in (0, -1, "x", 2**60)),
            *({"step": at} for at in ("x", None, -1, 1.5, 1e30, [2])),
            *({"step": 2, name: "x"} for name in ("loss", "seconds", "tokens", "epoch", "gpu_memory_bytes")),
        ],
    )
    def test_a_step_that_cannot_be_is_passed_over(self, tmp_path: Path, odd: dict[str, Any]) -> None:
        """A page, a status and a resumed run count with it."""
        file = tmp_path / "metrics.jsonl"
        JsonLines(file).tell(step(1))
        line = json.loads(file.read_bytes()) | odd
        with file.open("a") as more:
            more.write(json.dumps(line) + "\n")
        assert records(file) == [step(1)]

    @pytest.mark.parametrize(
        "line",
        [
            {"record": "evaluation", "step": [1], "metrics": {}},
            {"record": "evaluation", "step": 1, "metrics": {"eval_loss": "x"}},
            {"record": "saved", "step": "x", "uri": "u", "bytes": 1, "seconds": 1},
            {"record": "note", "kind": "resumed", "message": "m", "fields": ["step"]},
            {"record": "note", "kind": 1, "message": "m"},
        ],
    )
    def test_a_record_of_another_shape_is_passed_over(self, tmp_path: Path, line: dict[str, Any]) -> None:
        file = tmp_path / "metrics.jsonl"
        file.write_text(json.dumps(line | {"time": 1.0}) + "\n")
        assert records(file) == []

    def test_a_message_that_is_no_text_is_told_as_well_as_it_can_be(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        JsonLines(file).tell(Note("failed", "\ud800 alone", {"path": Path("/a"), "big": 1 << 80}))
        (read,) = records(file)
        assert isinstance(read, Note)
        assert (read.message, read.fields["path"]) == ("? alone", "/a")

    def test_a_loss_that_is_no_number_stays_json_and_is_read_as_one(self, tmp_path: Path) -> None:
        file = tmp_path / "metrics.jsonl"
        JsonLines(file).tell(step(1, loss=math.nan))
        assert json.loads(file.read_text())["loss"] is None
        (read,) = records(file)
        assert isinstance(read, Step)
        assert math.isnan(read.loss)
        assert read.gpu_memory_bytes is None


class TestProgress:
    def status(self, file: Path) -> dict[str, object]:
        found: dict[str, object] = json.loads(file.read_bytes())["trainerStatus"]
        return found

    def test_it_speaks_as_kubeflow_trainer_does(self, tmp_path: Path) -> None:
        file = tmp_path / "progress.json"
        progress = Progress(file, interval_s=0)
        for record in ALL:
            progress.tell(record)
        status = self.status(file)
        assert set(status) == {"progressPercentage", "estimatedRemainingSeconds", "metrics", "lastUpdatedTime"}
        assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (5, 19)
        metrics = status["metrics"]
        assert isinstance(metrics, list)
        assert {"name": "loss", "value": "2"} in metrics
        assert {"name": "eval_loss", "value": "2.25"} in metrics
        assert {"name": "checkpointStep", "value": "2"} in metrics
        # As the API's validation has it: both are text of 1 to 64 characters.
        assert all(1 <= len(each[key]) <= 64 for each in metrics for key in ("name", "value"))
        assert list(tmp_path.iterdir()) == [file]

    def test_100_percent_is_the_last_step_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "progress.json"
        progress = Progress(file, interval_s=0)
        progress.tell(step(999, 1000))
        assert self.status(file)["progressPercentage"] == 99
        progress.tell(step(1000, 1000))
        assert self.status(file)["progressPercentage"] == 100

    def test_steps_in_between_are_held_back_and_the_last_never_is(self, tmp_path: Path) -> None:
        file = tmp_path / "progress.json"
        progress = Progress(file, interval_s=3600)
        progress.tell(step(1, 4))
        progress.tell(step(2, 4))
        assert self.status(file)["progressPercentage"] == 25
        progress.close()
        assert self.status(file)["progressPercentage"] == 50
        progress.tell(step(4, 4))
        assert self.status(file)["progressPercentage"] == 100

    def test_another_process_goes_on_from_what_was_known(self, tmp_path: Path) -> None:
        file = tmp_path / "progress.json"
        Progress(file).tell(step(40))
        Progress(file).tell(Note("done", "published"))
        status = self.status(file)
        assert status["progressPercentage"] == 100
        metrics = status["metrics"]
        assert isinstance(metrics, list)
        assert {"name": "state", "value": "done"} in metrics
        assert {"name": "currentStep", "value": "40"} in metrics
        Progress(file).tell(step(1))
        assert self.status(file)["progressPercentage"] == 2
        assert {"name": "state", "value": "training"} in json.loads(file.read_bytes())["trainerStatus"]["metrics"]

    @pytest.mark.parametrize(
        "before", [b"", b"{", b"[]", b'{"trainerStatus": 7}', b'{"trainerStatus": {"metrics": [7]}}']
    )
    def test_what_cannot_be_read_is_nothing(self, tmp_path: Path, before: bytes) -> None:
        file = tmp_path / "progress.json"
        file.write_bytes(before)
        Progress(file).tell(step(20))
        assert self.status(file)["progressPercentage"] == 50

    def test_what_is_unknown_is_left_out(self, tmp_path: Path) -> None:
        file = tmp_path / "progress.json"
        Progress(file).tell(Note("started", "8 rows"))
        assert set(self.status(file)) == {"metrics", "lastUpdatedTime"}


class TestPrometheus:
    def scraped(self, told: list[Record]) -> str:
        served = Prometheus(0, {"name": "support-bot", "method": "lora"}, "127.0.0.1")
        try:
            for record in told:
                served.tell(record)
            with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=10) as answer:
                text: str = answer.read().decode()
                return text
        finally:
            served.close()

    def test_the_newest_of_each_is_exposed(self) -> None:
        lines = self.scraped(ALL).splitlines()
        for line in (
            'aim_trainer_run_info{method="lora",name="support-bot"} 1.0',
            "aim_trainer_loss 2.0",
            "aim_trainer_learning_rate 0.0001",
            "aim_trainer_gradient_norm 0.5",
            "aim_trainer_tokens_total 2000.0",
            "aim_trainer_trained_tokens_total 600.0",
            "aim_trainer_tokens_per_second 2000.0",
            "aim_trainer_step 2.0",
            "aim_trainer_planned_steps 40.0",
            "aim_trainer_epoch 0.1",
            "aim_trainer_eta_seconds 19.0",
            "aim_trainer_gpu_memory_bytes 4096.0",
            "aim_trainer_checkpoint_step 2.0",
            "aim_trainer_checkpoint_size_bytes 2048.0",
            'aim_trainer_evaluation{metric="eval_loss"} 2.25',
            'aim_trainer_evaluation{metric="perplexity"} 12.2',
        ):
            assert line in lines
        (age,) = (float(line.split()[1]) for line in lines if line.startswith("aim_trainer_checkpoint_age_seconds "))
        assert 0 <= age < 60

    def test_what_was_not_told_is_not_exposed(self) -> None:
        exposed = self.scraped([step(1)])
        assert "aim_trainer_loss 2.0" in exposed
        for absent in ("gpu_memory", "checkpoint", "evaluation"):
            assert absent not in exposed

    @pytest.mark.system
    def test_promtool_finds_nothing_to_say(self) -> None:
        promtool = shutil.which("promtool")
        if promtool is None:
            pytest.skip("promtool is missing: make system-deps")
        check = subprocess.run(
            [promtool, "check", "metrics"], input=self.scraped(ALL), text=True, capture_output=True, check=False
        )
        assert (check.returncode, check.stdout, check.stderr) == (0, "", "")

    def test_its_port_is_free_again_once_it_is_closed(self) -> None:
        served = Prometheus(0, {}, "127.0.0.1")
        served.close()
        served.close()
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", served.port), 5):
            pass


class Controller:
    """Takes a TrainJob's status as Kubeflow Trainer's controller does: with its token alone."""

    def __init__(self, status: int = 200) -> None:
        self.bodies: list[dict[str, object]] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                known = self.headers["authorization"] == "Bearer a-token"
                self.send_response(status if known else 401)
                self.end_headers()
                bodies.append(json.loads(body))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/status"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class TestKubeflow:
    def environment(self, folder: Path, url: str) -> dict[str, str]:
        (folder / "token").write_text("a-token\n")
        return {kubeflow.URL: url, kubeflow.TOKEN: str(folder / "token")}

    def test_the_controller_is_told_what_is_newest_and_the_end(self, tmp_path: Path) -> None:
        with Controller() as controller:
            sink = Kubeflow(self.environment(tmp_path, controller.url), interval_s=3600)
            for at in range(1, 41):
                sink.tell(step(at))
            sink.close()
        assert 1 <= len(controller.bodies) <= 2, "never one for each step"
        status = controller.bodies[-1]["trainerStatus"]
        assert isinstance(status, dict)
        assert status["progressPercentage"] == 100
        assert {"name": "currentStep", "value": "40"} in status["metrics"]

    def test_a_controller_that_refuses_is_said_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with Controller(status=500) as controller:
            sink = Kubeflow(self.environment(tmp_path, controller.url), interval_s=0.01)
            for at in range(1, 4):
                sink.tell(step(at))
                while len(controller.bodies) < at:
                    time.sleep(0.01)
            sink.close()
        assert [message.count("takes no status") for message in caplog.messages] == [1]

    def test_a_controller_that_is_away_costs_nobody_anything(self, tmp_path: Path, port: int) -> None:
        sink = Kubeflow(self.environment(tmp_path, f"http://127.0.0.1:{port}/status"))
        sink.tell(step(1))
        sink.close()
        sink.close()


class TestPublished:
    def environment(self, folder: Path, url: str) -> dict[str, str]:
        (folder / "token").write_text("a-token\n")
        return {published.URL: url, kubeflow.TOKEN: str(folder / "token")}

    def test_what_was_published_is_told_with_its_profile(self, tmp_path: Path) -> None:
        (tmp_path / "profile.yaml").write_text("aim_id: bot\n")
        fields: dict[str, object] = {"uri": "s3://m/v1", "digest": "d", "profile": str(tmp_path / "profile.yaml")}
        with Controller() as controller:
            sink = published.Published(self.environment(tmp_path, controller.url))
            sink.tell(step(1))
            sink.tell(Note("started", "…"))
            sink.tell(Note("done", "published", fields))
        assert controller.bodies == [{"uri": "s3://m/v1", "digest": "d", "profile": "aim_id: bot\n"}]

    def test_an_operator_that_starts_anew_is_waited_for(self, tmp_path: Path) -> None:
        pauses: list[float] = []
        with Controller(status=503) as controller:
            sink = published.Published(self.environment(tmp_path, controller.url), pauses.append)
            with pytest.raises(OSError, match="503"):
                sink.tell(Note("done", "published", {"uri": "s3://m/v1"}))
        assert sum(pauses) > 60
        assert len(controller.bodies) == len(pauses) + 1

    def test_one_that_refuses_is_not_asked_again(self, tmp_path: Path) -> None:
        with Controller(status=403) as controller:
            sink = published.Published(self.environment(tmp_path, controller.url), pytest.fail)
            with pytest.raises(OSError, match="403"):
                sink.tell(Note("done", "published", {"uri": "s3://m/v1"}))


class TestTensorBoard:
    def test_tensorboard_reads_it_and_forgets_what_was_made_again(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard.summary")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        from aim_trainer.metrics.tensor_board import TensorBoard

        for first, last, loss in ((1, 5, 9.0), (4, 6, 1.0)):
            written = TensorBoard(tmp_path)
            for at in range(first, last + 1):
                written.tell(step(at, loss=loss))
            written.tell(Evaluation(last, {"eval_loss": loss, "perplexity": 2.0}))
            written.close()
            written.close()
        read = EventAccumulator(str(tmp_path))
        read.Reload()
        assert [(each.step, each.value) for each in read.Scalars("train/loss")] == [
            (1, 9.0),
            (2, 9.0),
            (3, 9.0),
            (4, 1.0),
            (5, 1.0),
            (6, 1.0),
        ]
        assert [each.step for each in read.Scalars("eval/loss")] == [6]
        assert "eval/perplexity" in read.Tags()["scalars"]


class TestTerminal:
    def test_a_log_has_the_first_step_the_last_and_some_between(self) -> None:
        now = 0.0
        stream = io.StringIO()
        lines = Lines(stream, lambda: now)
        for at in range(1, 2001):
            now = at * 0.5
            lines.tell(step(at, 2000))
        said = stream.getvalue().splitlines()
        assert said[0].startswith("step 1/2000 (0 %)  loss 2.0000  lr 1.00e-04  2,000 tokens/s  16 min 40 s left")
        assert said[-1].startswith("step 2000/2000 (100 %)")
        assert 20 < len(said) < 50
        assert all("\x1b" not in line and "\r" not in line for line in said)

    def test_a_slow_run_tells_each_step_and_events_are_always_told(self) -> None:
        now = 0.0
        stream = io.StringIO()
        lines = Lines(stream, lambda: now)
        for at in (1, 2, 3):
            now = at * 60.0
            lines.tell(step(at))
        for record in ALL:
            if not isinstance(record, Step):
                lines.tell(record)
        assert stream.getvalue().splitlines()[3:] == [
            "started: 8 rows",
            "evaluated at step 0: eval_loss 2.5000, perplexity 12.2000",
            "checkpoint of step 2: file:///run/checkpoints/step-000002 (2.0 KiB in 0.2 s)",
            "evaluated at step 2: eval_loss 2.2500",
        ]
        assert len(stream.getvalue().splitlines()) == 7

    def test_a_terminal_has_a_bar_with_events_above_it(self) -> None:
        stream = io.StringIO()
        bar = Bar(Console(file=stream, force_terminal=True, width=80))
        for record in [
            *ALL,
            Note("failed", "[red]no markup of ours[/red]"),
            Note("read", "one ⟦two\nthree⟧"),
            step(40),
        ]:
            bar.tell(record)
        bar.close()
        drawn = stream.getvalue()
        assert "100 %" in drawn
        assert "step 40/40  loss 2.0000  2,000 tokens/s" in drawn
        assert " left" not in drawn[drawn.index("step 40/40") :]
        assert "━━━━" in drawn
        assert "one \x1b[32m⟦two\x1b[0m\n\x1b[32mthree⟧\x1b[0m" in drawn  # what is trained is green
        assert "[red]no markup of ours[/red]" in drawn


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (90_000, "1 d 1 h"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
    ],
)
def test_time_is_told_as_people_do(seconds: float, said: str) -> None:
    assert seconds_in_words(seconds) == said


def test_sizes_are_told_as_people_do() -> None:
    assert [bytes_in_words(size) for size in (0, 1023, 1024, 3 << 30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB"]


class TestAllOfThem:
    JOB = FineTuningJob.model_validate(
        {
            "apiVersion": "aim.amd.com/v1alpha1",
            "kind": "FineTuningJob",
            "metadata": {"name": "support-bot"},
            "spec": {"baseModel": {"modelId": "m"}, "dataset": {"source": "s"}},
        }
    )

    def test_rank_0_has_them_and_the_others_write_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: int
    ) -> None:
        pytest.importorskip("tensorboard.summary")
        monkeypatch.setenv(sinks.METRICS_PORT, str(port))
        other = sinks.of(self.JOB, RunDirectory(tmp_path / "other"), 1)
        first = sinks.of(self.JOB, RunDirectory(tmp_path / "first"), 0)
        for record in ALL:
            other.tell(record)
            first.tell(record)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"aim_trainer_loss 2.0" in answer.read()
        other.close()
        first.close()
        assert not (tmp_path / "other").exists()
        assert {each.name for each in (tmp_path / "first").iterdir()} == {
            "metrics.jsonl",
            "progress.json",
            "tensorboard",
        }
        assert "step 1/40" in capsys.readouterr().err

    def test_a_port_that_is_taken_costs_the_port_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with socket.create_server(("0.0.0.0", 0)) as taken:
            monkeypatch.setenv(sinks.METRICS_PORT, str(taken.getsockname()[1]))
            sink = sinks.of(self.JOB, RunDirectory(tmp_path), 0)
            sink.tell(step(1))
            sink.close()
        assert ["Prometheus cannot be written" in message for message in caplog.messages] == [True]
        assert records(tmp_path / "metrics.jsonl") == [step(1)]

    def test_a_port_that_is_none_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv(sinks.METRICS_PORT, "http")
        sinks.of(self.JOB, RunDirectory(tmp_path), 0).close()
        assert "AIM_TRAINER_METRICS_PORT: a port, 0 to 65535 (got 'http')" in caplog.text

    def test_a_full_disk_is_said_once_and_stops_nobody(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        full = tmp_path / "metrics.jsonl"
        full.symlink_to("/dev/full")  # the kernel's own full disk
        there = tmp_path / "there.jsonl"
        sink = AllSinks([JsonLines(full), JsonLines(there)])
        with caplog.at_level(logging.WARNING):
            for at in (1, 2, 3):
                sink.tell(Note("started", str(at)))
            sink.close()
        assert [message.count("No space left on device") for message in caplog.messages] == [1]
        assert len(records(there)) == 3
