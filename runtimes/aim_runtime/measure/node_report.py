"""`make hardware`: what a node is and what it does, in one directory that a stranger can send back.

    python -m aim_runtime.measure.node_report --output DIR --model_dir DIR [--cpu] [--quick]

Each part stands alone: one that cannot be done is named in README.md with its reason. No host name, no serial number,
no path and no network address is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, get_args

from aim_profile.errors import AimProfileError
from aim_profile.nodes.facts import Node
from aim_profile.nodes.read import export_node, read_node
from aim_profile.serving.evidence import AimPrecision
from aim_runtime.measure.node_dump import dump

_READY_S = 1800.0
_STEP_S = 3600.0
_PR_SET_PDEATHSIG = 1
_ISOLATION = Path("bench/isolation.py")
_NAME = "measured"


class StepError(Exception):
    """A part that could not be done, in one line."""


class NotHereError(StepError):
    """A part that this machine has nothing for: no fault of anybody."""


@dataclass(slots=True)
class Report:
    """The directory, and what of it was done."""

    folder: Path
    model_dir: Path
    node: Node
    quick: bool
    cpu: bool
    model_id: str | None = None
    precision: str | None = None
    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def part(self, name: str, what: str, do: Callable[[], str]) -> None:
        """Do it; one line about it in README.md."""
        _say(f"{name} …")
        try:
            came = do()
        except NotHereError as error:
            came = f"not here: {error}"
        except StepError as error:
            came = f"**not done**: {error}"
            self.failed += 1
        self.lines.append(f"| `{name}` | {what} | {' '.join(came.split())} |")
        _say(f"{name}: {came}")


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 all parts; 1 one could not be done, or no GPU is here; 2 wrong arguments."""
    given = _parser().parse_args(argv)
    try:
        node = read_node(given.root)
    except AimProfileError as error:
        _say(f"error: {error}")
        return 1
    gpus = [card for card in node.cards if not card.is_cpu]
    if not gpus and not given.cpu:
        _say(
            "error: no AMD GPU on this machine (KFD, sysfs and amdsmi show none): make hardware CPU=1 does what it can"
        )
        return 1
    if not given.model_dir.exists():
        _say(f"error: --model_dir {given.model_dir}: no such file or directory: give a model that is here")
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    report = Report(given.output, given.model_dir, node, given.quick, given.cpu, given.model_id, given.precision)
    _all_parts(report, given.root or Path("/"))
    (report.folder / "README.md").write_text(_readme(report, gpus=len(gpus)), encoding="utf-8")
    _say(f"written: {report.folder}/README.md")
    return 1 if report.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="node_report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(".run/hardware"), help="default: .run/hardware")
    parser.add_argument("--model_dir", type=Path, required=True, help="the model that is served for it")
    parser.add_argument("--model_id", help="what profiles call it, as in org/model; default: the directory's name")
    parser.add_argument("--precision", choices=get_args(AimPrecision), help="of its weights: evidence needs it")
    parser.add_argument("--cpu", action="store_true", help="compute on processors, GPUs or not")
    parser.add_argument("--quick", action="store_true", help="a look, not figures to quote")
    parser.add_argument("--root", type=Path, help="a recorded tree instead of /")
    return parser


def _all_parts(report: Report, root: Path) -> None:
    report.part("node.yaml", "cards, modes, devices (`aim-profile node --node`)", lambda: _node(report))
    report.part("modes.txt", "every mode of these GPUs, and who validates it", lambda: _modes(report))
    report.part("sys/", "the kernel's files about them (`aim-profile node --root`)", lambda: _dump(report, root))
    try:
        with _served(report) as url:
            passed = "a known sentence is likely, its log probabilities are numbers, a greedy text is text"
            report.part("self-check", "asked before the server was ready (docs/runtime.md)", lambda: passed)
            what = "latency and throughput under rising load, its plot (docs/measure.md)"
            report.part("evidence/", what, lambda: _measure(report, url))
    except StepError as error:
        reason = str(error)
        report.part("self-check", "asked before a server is ready (docs/runtime.md)", lambda: _raise(reason))
    report.part("isolation.json", "what a busy neighbour costs (`make bench-isolation`)", lambda: _isolation(report))


def _raise(reason: str) -> str:
    raise StepError(reason)


def _node(report: Report) -> str:
    shown = report.node.model_copy(update={"name": "node"})
    (report.folder / "node.yaml").write_text(export_node(_without_serials(shown)), encoding="utf-8")
    cards = [f"{card.product} {card.mode_text}" for card in report.node.cards]
    return ", ".join(dict.fromkeys(cards)) + f" ({len(cards)} cards, {report.node.devices} devices)"


def _without_serials(node: Node) -> Node:
    known: dict[int, int] = {}

    def small(value: int | None) -> int | None:
        return None if value is None else known.setdefault(value, len(known) + 1)

    kept = {card.index: {"unique_id": small(card.unique_id), "hive_id": small(card.hive_id)} for card in node.cards}
    return node.model_copy(update={"cards": tuple(card.model_copy(update=kept[card.index]) for card in node.cards)})


def _modes(report: Report) -> str:
    products = dict.fromkeys(card.product for card in report.node.cards if card.accelerator is not None)
    if not products:
        raise NotHereError("no GPU of the catalogue is here")
    texts = [_run([sys.executable, "-m", "aim_profile", "gpus", product], 60) for product in products]
    (report.folder / "modes.txt").write_text("\n".join(texts), encoding="utf-8")
    return ", ".join(products)


def _dump(report: Report, root: Path) -> str:
    number = dump(root / "sys", report.folder / "sys")
    if not number:
        raise NotHereError("no KFD and no amdgpu driver here")
    return f"{number} files, serial numbers replaced"


@contextlib.contextmanager
def _served(report: Report) -> Iterator[str]:
    """The model behind our runtime with its self-check, ended on the way out. Raises StepError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "aim_runtime", "--model_dir", str(report.model_dir), "--model_name", _NAME]
    command += ["--host", "127.0.0.1", "--http_port", str(port), "--grpc_port", "0", "--self_check", "always"]
    with (report.folder / ".server.log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=_die_with_us)
        try:
            _await_ready(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            (report.folder / ".server.log").unlink(missing_ok=True)


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _await_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            said = log.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
            raise StepError(f"the server did not start: {said[-1] if said else f'exit code {process.returncode}'}")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/v2/health/ready"):
            return
        time.sleep(0.2)
    raise StepError(f"the server was not ready in {_READY_S:g} s")


def _measure(report: Report, url: str) -> str:
    levels = ("--rates", "0.5,1", "--level-seconds", "4") if report.quick else ("--max-seconds", "600")
    short = ("--output-tokens", "constant:8", "--prompt-tokens", "constant:32") if report.quick else ()
    on_cpu = ("--on-cpu",) if report.cpu else ()
    precision = ("--precision", report.precision) if report.precision else ()
    command = [sys.executable, "-m", "aim_runtime", "measure", "--url", url, "--output", f"{report.folder}/evidence"]
    command += ["--model-id", report.model_id or report.model_dir.name]
    said = _run([*command, *precision, *levels, *short, *on_cpu], _STEP_S, stderr=True)
    return "; ".join(line for line in said.splitlines() if line.startswith("knee"))


def _isolation(report: Report) -> str:
    if not _ISOLATION.is_file():
        raise NotHereError(f"{_ISOLATION} is not here: run `make hardware` in a checkout")
    devices = report.node.devices
    if devices < 2 and not report.cpu:
        raise NotHereError("one device only: there is no neighbour")
    file = report.folder / "isolation.json"
    bound = () if report.cpu else ("--measured", "ROCR_VISIBLE_DEVICES=0", "--neighbour", "ROCR_VISIBLE_DEVICES=1")
    engine = () if report.cpu else ("--engine", "vllm")
    options = ["--json", str(file), "--model", str(report.model_dir), *engine, *bound]
    _run([sys.executable, str(_ISOLATION), *options, *(("--quick",) if report.quick else ())], _STEP_S)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise StepError("it wrote no figures") from None
    file.write_text(json.dumps({**found, "model": report.model_dir.name}, indent=2) + "\n", encoding="utf-8")
    return "figures in the file"


def _run(command: Sequence[str], limit_s: float, *, stderr: bool = False) -> str:
    """What it prints. Raises StepError with its last line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        raise StepError(f"did not end in {limit_s:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise StepError(said[-1] if said else f"exit code {done.returncode}")
    return done.stderr if stderr else done.stdout


def _readme(report: Report, *, gpus: int) -> str:
    what = "processors only" if report.cpu else f"{gpus} GPUs"
    versions = {"python": platform.python_version(), "kernel": platform.release(), "system": platform.system()}
    body = "\n".join(report.lines)
    return (
        f"# A node's report: {what}\n\n"
        "No host name, network address, path or serial number is in it. Send the whole directory.\n\n"
        f"| file | what it is | what came of it |\n|---|---|---|\n{body}\n\n"
        f"`{json.dumps(versions)}`\n"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201  what a person reads while it runs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
