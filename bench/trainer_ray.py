"""What Ray costs a training run: CPU seconds of its worker, step for step, beside the same run without Ray.

    .venv-trainer/bin/python bench/trainer_ray.py [--quick]

The sample job (SmolLM2, LoRA, one worker, one thread) in pairs, one after the other, each in processes of its own. What
is counted lies between the end of the first step and the end of the last: loading the model and starting Ray is said
apart. Losses must be the same to the last bit. Bound: 1.05 at the median.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).parent.parent
JOB = ROOT / "docs/samples/finetuning/job.yaml"
STEPS, ROWS, ROUNDS, MOST_RATIO = 10, 10, 5, 1.05


@dataclass(frozen=True)
class Measured:
    """begin_s: from the start of the command to the end of the first step; cpu_s, wall_s: of the steps after it, of
    the process that trains; losses: as hexadecimal floats.
    """

    begin_s: float
    cpu_s: float
    wall_s: float
    losses: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/trainer_ray.json")
    parser.add_argument("--work", nargs=2, metavar=("HOW", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    pairs = [(measured("plain"), measured("ray")) for _ in range(1 if options.quick else ROUNDS)]
    ratios = [ray.cpu_s / plain.cpu_s for plain, ray in pairs]
    same = all(plain.losses == ray.losses == pairs[0][0].losses for plain, ray in pairs)
    print(f"{'':8}{'begin s':>10}{'cpu s':>10}{'wall s':>10}   (medians; {STEPS - 1} steps of SmolLM2 with LoRA)")
    for name, side in zip(("plain", "ray"), zip(*pairs, strict=True), strict=True):
        figures = [median(getattr(one, field) for one in side) for field in ("begin_s", "cpu_s", "wall_s")]
        print(f"{name:8}" + "".join(f"{figure:10.2f}" for figure in figures))
    print(f"CPU ratio {median(ratios):.3f} ({', '.join(f'{ratio:.3f}' for ratio in ratios)}), losses", end=" ")
    print("the same to the last bit" if same else "DIFFER")
    found = {"ratio": median(ratios), "ratios": ratios, "same_losses": same}
    options.json.write_text(json.dumps(found | {"pairs": [[asdict(one) for one in pair] for pair in pairs]}, indent=1))
    return 0 if same and median(ratios) <= MOST_RATIO else 1


def measured(how: str) -> Measured:
    """One run."""
    with tempfile.TemporaryDirectory() as directory:
        metrics, began = Path(directory, "metrics.jsonl"), time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "--work", how, directory]
        roots = os.pathsep.join(str(ROOT / name) for name in ("profiles", "trainers"))
        environment = {**os.environ, "PYTHONPATH": roots, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            first, first_cpu_s = _when(metrics, 1, process, how)
            last, last_cpu_s = _when(metrics, STEPS, process, how)
        assert process.returncode == 0, f"{how} ended with {process.returncode}"
        steps = [record for record in map(json.loads, metrics.open()) if record["record"] == "step"]
        losses = [float(record["loss"]).hex() for record in steps]
        return Measured(first - began, last_cpu_s - first_cpu_s, last - first, losses)


def _when(metrics: Path, step: int, process: subprocess.Popen[bytes], how: str) -> tuple[float, float]:
    """Seconds on the clock, and CPU seconds of the process that trains, when a step was told."""
    wanted = f'"step":{step},'
    while not (metrics.is_file() and wanted in metrics.read_text()):
        assert process.poll() is None, f"{how} ended with {process.returncode} before step {step}"
        time.sleep(0.005)
    worker = psutil.Process(process.pid)
    if how == "ray":
        (worker,) = (
            child for child in worker.children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())
        )
    used = worker.cpu_times()
    return time.monotonic(), used.user + used.system


def work(how: str, directory: str) -> int:
    """Prepares the sample's rows and trains."""
    from aim_trainer import runner
    from aim_trainer.data.prepare import prepare
    from aim_trainer.job.read import read_job
    from aim_trainer.recipe.base import read_tokenizer
    from aim_trainer.run_directory import RunDirectory
    from aim_trainer.worker import Rows

    asked = {"hyperparameters.maxSteps": STEPS, "checkpoints.everySteps": STEPS}
    asked |= dict.fromkeys(("hyperparameters.batchSize", "hyperparameters.globalBatchSize"), ROWS)
    job = read_job(JOB, [f"spec.{name}={value}" for name, value in asked.items()])
    run = RunDirectory(Path(directory))
    read_tokenizer(job.spec.base_model).save_pretrained(run.tokenizer)
    prepared = prepare(job, run.tokenizer, run.data)
    rows = Rows(prepared.train, None, prepared.digest)
    return 0 if runner.train(job, run, rows, ray=how == "ray").step == STEPS else 1


if __name__ == "__main__":
    raise SystemExit(main())
