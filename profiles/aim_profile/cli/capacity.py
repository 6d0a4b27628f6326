"""The verb `capacity`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    FACTS,
    DeploymentOption,
    EvidenceOption,
    KvDtypeOption,
    OutputOption,
    PartitionOption,
    PrecisionOption,
    guarded,
    refuse_beside,
)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("capacity", rich_help_panel=FACTS)(capacity)


def capacity(
    model: Annotated[str, typer.Argument(help="A model id, or a directory with a config.json.")],
    gpu: Annotated[str, typer.Option(help="A GPU of the catalogue.")] = "MI300X",
    partition: PartitionOption = None,
    every_mode: Annotated[bool, typer.Option("--every-mode", help="Each partition mode beside the others.")] = False,
    precision: PrecisionOption = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of a prompt, on average; 512 when left out.", min=1, max=2**24)
    ] = None,
    answer: Annotated[
        int | None, typer.Option(help="Tokens of an answer, on average; 256 when left out.", min=1, max=2**24)
    ] = None,
    requests_per_s: Annotated[
        float | None, typer.Option(help="Plan for so many: engines and cards of each mode.", min=1e-6, max=1e6)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Plan for a recorded day: JSON lines with t, prompt_tokens and output_tokens.")
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="With --trace: of its windows; 95 when left out.", min=0.001, max=100)
    ] = None,
    window: Annotated[
        float | None, typer.Option(help="With --trace: seconds of one; 60 when left out.", min=0.001, max=86_400)
    ] = None,
    ttft_ms: Annotated[
        float | None, typer.Option(help="Promised: milliseconds to the first token.", min=0.001, max=3_600_000)
    ] = None,
    itl_ms: Annotated[
        float | None, typer.Option(help="Promised: milliseconds between tokens.", min=0.001, max=3_600_000)
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", "--tp", help="Devices; the fewest when left out.", min=1, max=64)
    ] = None,
    kv_dtype: KvDtypeOption = "auto",
    evidence: EvidenceOption = None,
    prices: Annotated[Path | None, typer.Option(help="A price table, as the exporter takes: what tokens cost.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file.")] = None,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """How many requests a card serves within a promised latency, in which mode most, and what ends it.

    Measured where there is evidence of it; else a range, by evidence of the same class of hardware; else only a bound.

    Example: `aim-profile capacity meta-llama/Llama-3.1-8B-Instruct --gpu MI355X --every-mode --ttft-ms 500 --itl-ms 50`
    """
    from . import capacities, mode_capacity

    def verb() -> int:
        if every_mode:
            refuse_beside("--every-mode", {"partition": partition})
        if trace is None:
            refuse_beside("a capacity without --trace", {"percentile": percentile, "window": window})
        else:
            told = {"prompt": prompt, "answer": answer, "requests-per-s": requests_per_s}
            refuse_beside(f"--trace {trace}", told)
        asked = mode_capacity.asked_load(
            trace, percentile or 95.0, window or 60.0, prompt or 512, answer or 256, requests_per_s
        )
        question = mode_capacity.question(model, precision, asked, ttft_ms, itl_ms, kv_dtype)
        return capacities.capacity(
            output,
            question,
            gpu,
            partition,
            every_mode,
            deployment,
            tp=tensor_parallel,
            evidence=evidence,
            prices=prices,
            svg=svg,
        )

    guarded(verb)
