"""`aim-profile`: the verbs and their options. What they do is in the files beside this one, imported when asked for.

Exit codes: 0 it fits, or is equal; 1 it does not; 2 bad input, said in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import capacity, doctor, exporter, plan_verbs
from .options import (
    FACTS,
    PROFILES,
    AimPrecision,
    AllocModeOption,
    AmdSmiOption,
    DeploymentOption,
    Engine,
    EvidenceOption,
    Form,
    GpuOption,
    KvDtypeOption,
    Metric,
    NodeOption,
    OutOption,
    OutputOption,
    PartitionOption,
    Precision,
    PrecisionOption,
    Priority,
    ReferenceArgument,
    RootOption,
    SchemaKind,
    guarded,
    refuse_beside,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Which model fits which partition of which AMD Instinct GPU, and how it is served there.\n\n"
    "Exit codes: 0 it fits, or is equal; 1 it does not; 2 bad input.",
)
node_app = typer.Typer(invoke_without_command=True)


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"aim-profile {version('aim-kserve')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print it.")] = False,
) -> None:
    pass


app.add_typer(node_app, name="node", rich_help_panel=FACTS)


@app.command(rich_help_panel=FACTS)
def gpus(
    name: Annotated[str | None, typer.Argument(help="One GPU, with every mode and its source.")] = None,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """Accelerators: XCDs, memory and the partition modes AMD validates or the driver accepts.

    Example: `aim-profile gpus MI300X --deployment sr-iov`
    """
    from . import facts

    guarded(lambda: facts.gpus(output, name, deployment))


@app.command(rich_help_panel=FACTS)
def models(
    model: Annotated[
        str | None, typer.Argument(help="A model id, a directory with a config.json, or a GGUF file.")
    ] = None,
    output: OutputOption = "table",
) -> None:
    """Known models: parameters, weights and KV cache per token; or those of your own files.

    Example: `aim-profile models Qwen/Qwen3-32B`
    """
    from . import facts

    guarded(lambda: facts.models(output, model))


@node_app.callback()
def node(
    context: typer.Context,
    root: RootOption = None,
    amd_smi: AmdSmiOption = None,
    node: NodeOption = None,
    output: OutputOption = "table",
) -> None:
    """What is on this machine, or on a recorded or emulated one: cards, partitions, modes. Changes nothing.

    Example: `aim-profile node -o json`, `aim-profile node export node.yaml`
    """
    if context.invoked_subcommand is not None:
        return
    from . import device, facts

    guarded(lambda: facts.node(output, device.find_node(root, amd_smi or (), node)))


@node_app.command("export")
def node_export(
    file: Annotated[Path | None, typer.Argument(help="The file to write; stdout when left out.")] = None,
    root: RootOption = None,
    amd_smi: AmdSmiOption = None,
    node: NodeOption = None,
) -> None:
    """Write the node as an emulation file, which every `--node` reads back as it was.

    Example: `aim-profile node export --root recorded/ node.yaml`
    """
    from . import device, facts

    guarded(lambda: facts.export(device.find_node(root, amd_smi or (), node), file))


@app.command(rich_help_panel=FACTS)
def fit(
    model: Annotated[str, typer.Argument(help="A model id, a directory with a config.json, or a GGUF file.")],
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    memory: Annotated[str | None, typer.Option(help="Instead of --gpu: what the device holds, as in 24GiB.")] = None,
    precision: PrecisionOption = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence; 8192, or the model's limit if less, when left out.", min=1)
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Sequences of that length at once.", min=1)] = 1,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "--tp", help="Devices together.", min=1)] = 1,
    metric: Annotated[Metric, typer.Option(help="What the engine is tuned for: its tokens per step.")] = "latency",
    kv_dtype: KvDtypeOption = "auto",
    utilization: Annotated[float, typer.Option(help="Share of the device the engine may take.")] = 0.90,
    lora_slots: Annotated[int, typer.Option(help="LoRA adapters resident at once.", min=0)] = 0,
    lora_rank: Annotated[int, typer.Option(help="Their highest rank.", min=1)] = 16,
    encoder_tokens: Annotated[int, typer.Option(help="Image tokens a sequence keeps (Llama Vision).", min=0)] = 0,
    deployment: DeploymentOption = "bare-metal",
    root: RootOption = None,
    node: NodeOption = None,
    card: Annotated[int | None, typer.Option(help="Of the node that is read; the first.", min=0)] = None,
    output: OutputOption = "table",
) -> None:
    """Does a model fit a device? Exit 0 with the headroom, or 1 with the shortfall and what would fit.

    Without --gpu and --memory the node is read.

    Example: `aim-profile fit meta-llama/Llama-3.1-8B-Instruct --gpu MI300X --partition CPX/NPS4 --context 32768`
    """
    from . import device, facts

    guarded(
        lambda: facts.fit(
            output,
            model,
            device.device(gpu, partition, memory, deployment, (root, node, card)),
            precision=precision,
            context=context,
            metric=metric,
            concurrency=concurrency,
            tp=tensor_parallel,
            kv_dtype=kv_dtype,
            utilization=utilization,
            lora_slots=lora_slots,
            lora_rank=lora_rank,
            encoder_tokens=encoder_tokens,
        )
    )


capacity.add_to(app)
doctor.add_to(app)
exporter.add_to(app)


@app.command("list", rich_help_panel=PROFILES)
def list_profiles(
    gpu: Annotated[str, typer.Option(help="A GPU of the catalogue.")] = "MI300X",
    model: Annotated[str | None, typer.Option(help="One model only.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the weights; bf16, fp8 and int4 when left out.")
    ] = None,
    every_mode: Annotated[
        bool, typer.Option("--every-mode", help="Each partition mode, not only the smallest validated one that fits.")
    ] = False,
    evidence: EvidenceOption = None,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """Profiles that can be derived: every model × precision on the smallest device that holds it.

    Known models without enough facts, and what fits nowhere, are named on stderr.

    Example: `aim-profile list --gpu MI355X --every-mode`
    """
    from . import profiles

    guarded(
        lambda: profiles.list_profiles(
            output,
            gpu=gpu,
            deployment=deployment,
            model=model,
            precision=precision,
            everything=every_mode,
            evidence=evidence,
        )
    )


@app.command(rich_help_panel=PROFILES)
def select(
    model: Annotated[str, typer.Argument(help="A model id, or a directory with a config.json.")],
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    count: Annotated[int, typer.Option(help="Devices there are, with --gpu.", min=1, max=64)] = 1,
    card: Annotated[int | None, typer.Option(help="Without --gpu: the card of the node; the first.", min=0)] = None,
    precision: Annotated[AimPrecision | None, typer.Option(help="The one wanted; the fewest bits if left out.")] = None,
    metric: Annotated[Metric | None, typer.Option(help="What to tune for; latency when left out.")] = None,
    engine: Annotated[Engine | None, typer.Option(help="The engine; vllm when left out.")] = None,
    profiles: Annotated[
        Path | None, typer.Option(help="Profiles of yours or AIM's: `custom/`, `<org>/<model>/`, `general/`.")
    ] = None,
    evidence: EvidenceOption = None,
    alloc_mode: AllocModeOption = "CAPPING",
    root: RootOption = None,
    node: NodeOption = None,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """Choose the profile for the devices at hand, and say of every other why it lost. Exit 1 if none matches.

    Rules are AIM's, but a partition never takes a whole GPU's profile. Without --gpu the node is read.

    Example: `aim-profile select Qwen/Qwen3-8B --gpu MI300X --partition CPX/NPS4 --count 2`
    """
    from aim_profile.serving.selection import Wish

    from . import device
    from . import profiles as verbs

    def verb() -> int:
        if gpu is not None:
            refuse_beside(f"--gpu {gpu}", {"card": card, "root": root, "node": node})
        devices = (
            verbs.named_devices(gpu, partition, count, deployment, alloc_mode)
            if gpu is not None
            else verbs.devices_of(device.find_node(root, (), node), card)
        )
        return verbs.select_profile(output, model, devices, Wish(engine, metric, precision), profiles, evidence)

    guarded(verb)


@app.command(rich_help_panel=PROFILES)
def show(
    profile: ReferenceArgument,
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    precision: PrecisionOption = None,
    metric: Annotated[Metric | None, typer.Option(help="What to tune for; latency when left out.")] = None,
    context: Annotated[int | None, typer.Option(help="max-model-len; 8192 when left out.", min=1)] = None,
    concurrency: Annotated[int | None, typer.Option(help="max-num-seqs; what fits when left out.", min=1)] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", "--tp", help="Devices; the fewest when left out.", min=1)
    ] = None,
    kv_dtype: KvDtypeOption = "auto",
    alloc_mode: AllocModeOption = "CAPPING",
    memory_limit: Annotated[str | None, typer.Option(help="The most to take of a device, as in 40GB.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Repository with the weights in that precision.")] = None,
    priority: Annotated[Priority, typer.Option(help="Who yields to whom.")] = "medium",
    lora_slots: Annotated[int, typer.Option(help="LoRA adapters resident at once.", min=0)] = 0,
    lora_rank: Annotated[int, typer.Option(help="Their highest rank.", min=1)] = 16,
    evidence: EvidenceOption = None,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """One profile: engine arguments, environment, memory, and how sure it is.

    Example: `aim-profile show meta-llama/Llama-3.1-8B-Instruct/vllm-mi300x-cpx-nps4-bf16-tp1-latency`
    """
    from . import profiles

    def verb() -> int:
        wanted = profiles.wanted(
            precision=precision,
            metric=metric,
            context=context,
            concurrency=concurrency,
            tensor_parallel=tensor_parallel,
            kv_dtype=kv_dtype,
            alloc_mode=alloc_mode,
            memory_limit=memory_limit,
            checkpoint=checkpoint,
            qos_priority=priority,
            lora_slots=lora_slots,
            lora_rank=lora_rank,
        )
        found = profiles.find_profile(profile, wanted, partition, gpu, deployment)
        return profiles.show_profile(output, profiles.with_evidence(found, evidence))

    guarded(verb)


@app.command(rich_help_panel=PROFILES)
def export(
    profile: ReferenceArgument,
    form: Annotated[Form, typer.Option(help="Ours, AIM's YAML, or the prototype's unified JSON.")] = "ours",
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    precision: PrecisionOption = None,
    out: OutOption = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Write under this folder as AIM does: `<org>/<model>/<id>.yaml`.")
    ] = None,
    evidence: EvidenceOption = None,
    deployment: DeploymentOption = "bare-metal",
) -> None:
    """Write a profile as a file. For more options, `aim-profile show … -o yaml` gives the same as `--form ours`.

    Example: `aim-profile export Qwen/Qwen3-8B/vllm-mi300x-fp8-tp1-latency --form aim --dir profiles/`
    """
    from . import profiles

    def verb() -> int:
        if folder is not None:
            refuse_beside(f"--dir {folder}", {"out": out})
        wanted = profiles.wanted(precision=precision)
        found = profiles.find_profile(profile, wanted, partition, gpu, deployment)
        return profiles.export_profile(profiles.with_evidence(found, evidence), form, out, folder)

    guarded(verb)


@app.command(rich_help_panel=PROFILES)
def validate(
    files: Annotated[list[Path], typer.Argument(help="Profiles in any form.")], output: OutputOption = "table"
) -> None:
    """Hold profiles against the facts: form, partition, memory. Exit 1 if one contradicts them, 2 if malformed.

    Example: `aim-profile validate profiles/*.yaml`
    """
    from . import profiles

    guarded(lambda: profiles.validate(output, files))


@app.command(rich_help_panel=PROFILES)
def schema(
    kind: Annotated[SchemaKind, typer.Argument(help="The kind of file.")] = "profile",
) -> None:
    """Print the JSON Schema of a file, for editors and pipelines.

    Example: `aim-profile schema profile > profile.schema.json`
    """
    from . import profiles

    guarded(lambda: profiles.schema(kind))


plan_verbs.add_to(app)
