"""The options that several verbs share, and how a verb ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from aim_profile.errors import AimProfileError

from .output import BAD_INPUT, DOES_NOT_FIT, Output, print_error

# Spelled out again so that --help needs no facts; a test holds them equal to their sources.
Deployment = Literal["bare-metal", "passthrough", "sr-iov"]
Precision = Literal["bf16", "fp16", "fp8", "int8", "int4", "mxfp4"]
AimPrecision = Literal["int4", "int8", "fp4", "fp8", "fp16", "bf16", "fp32"]
Metric = Literal["latency", "throughput"]
Engine = Literal["vllm", "llama_cpp"]
KvDtype = Literal["auto", "bf16", "fp16", "fp8"]
AllocMode = Literal["CAPPING", "ALL"]
Priority = Literal["low", "medium", "high"]
Form = Literal["ours", "aim", "unified"]
SchemaKind = Literal["profile", "unified", "fleet", "workloads", "plan", "evidence"]
Tier = Literal["validated", "driver-legal", "unsupported"]
Strategy = Literal["mixed", "single"]
Allocation = Literal["plugin", "dra"]

# Headings of the verbs in --help.
FACTS, PROFILES, PLANS = "Facts", "Profiles", "Plans"

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="A table for people, or JSON or YAML.")]
DeploymentOption = Annotated[
    Deployment, typer.Option(help="How the node is run; it decides which modes AMD validates.")
]
GpuOption = Annotated[str | None, typer.Option(help="A GPU of the catalogue, as in MI300X (`aim-profile gpus`).")]
PartitionOption = Annotated[
    str | None, typer.Option(help="COMPUTE/MEMORY, as in CPX/NPS4; the whole GPU when left out.")
]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Of the weights; the model's own when left out.")]
KvDtypeOption = Annotated[KvDtype, typer.Option(help="Of the KV cache.")]
AllocModeOption = Annotated[
    AllocMode, typer.Option(help="CAPPING: a device reports its share; ALL: all of its memory partition.")
]
RootOption = Annotated[
    Path | None, typer.Option(help="A recorded tree: a mirror of / or /sys, a folder with KFD's nodes/ or `<bdf>/`.")
]
AmdSmiOption = Annotated[list[Path] | None, typer.Option(help="Saved `amd-smi … --json` output; may be repeated.")]
NodeOption = Annotated[Path | None, typer.Option("--node", help="An emulation file (`aim-profile node export`).")]
EvidenceOption = Annotated[
    Path | None,
    typer.Option(help="What `aim-runtime measure` wrote: a file, or a directory to look in."),
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write to this file instead of stdout.")]
AllocationOption = Annotated[
    Allocation, typer.Option(help="Devices counted by AMD's device plugin, or claimed of its DRA driver.")
]
AutoPartitionOption = Annotated[
    bool, typer.Option("--auto-partition", help="With --allocation dra: claims that a coming driver partitions for.")
]
StrategyOption = Annotated[Strategy, typer.Option(help="The device plugin's resource naming strategy.")]
ReferenceArgument = Annotated[
    str, typer.Argument(help="ORG/MODEL/PROFILE-ID, a profile's file, or a model together with --gpu.")
]


def refuse_beside(other: str, given: Mapping[str, object]) -> None:
    """Raises AimProfileError for the first of these options that was given (is not None): `other` already decides it.

    An option that is silently ignored is an answer to another question than the one asked.
    """
    for option, value in given.items():
        if value is not None:
            raise AimProfileError(
                f"--{option} {value}: {other} already says that, or has no use for it",
                field=option,
                value=value,
                remedy="leave one of them out",
            )


def guarded(verb: Callable[[], int]) -> NoReturn:
    """Run a verb and leave with its exit code; what it refuses is one line on stderr."""
    try:
        code = verb()
    except AimProfileError as problem:
        print_error(str(problem))
        from aim_profile.serving.derive import NoSuchProfileError

        code = DOES_NOT_FIT if isinstance(problem, NoSuchProfileError) else BAD_INPUT
    raise typer.Exit(code)
