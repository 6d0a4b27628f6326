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
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, on average.", min=1, max=2**24)] = 512,
    answer: Annotated[int, typer.Option(help="Tokens of an answer, on average.", min=1, max=2**24)] = 256,
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
    from . import capacities

    def verb() -> int:
        if every_mode:
            refuse_beside("--every-mode", {"partition": partition})
        question = capacities.question(model, precision, prompt, answer, ttft_ms, itl_ms, kv_dtype)
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
