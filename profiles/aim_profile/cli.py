"""`aim-profile`: the verbs and their options. What they do is in verbs_*.py, imported only when asked for.

Exit codes: 0 it fits, or is equal; 1 it does not; 2 bad input, said in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from .errors import AimProfileError
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
SchemaKind = Literal["profile", "unified", "fleet", "workloads", "plan"]
Tier = Literal["validated", "driver-legal", "unsupported"]
Strategy = Literal["mixed", "single"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Which model fits which partition of which AMD Instinct GPU, and how it is served there.\n\n"
    "Exit codes: 0 it fits, or is equal; 1 it does not; 2 bad input.",
)
node_app = typer.Typer(invoke_without_command=True)
app.add_typer(node_app, name="node")

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="A table for people, or JSON or YAML.")]
DeploymentOption = Annotated[
    Deployment, typer.Option(help="How the node is run; it decides which modes AMD validates.")
]
GpuOption = Annotated[str | None, typer.Option(help="A GPU of the catalogue, as in MI300X (`aim-profile gpus`).")]
PartitionOption = Annotated[
    str | None, typer.Option(help="COMPUTE/MEMORY, as in CPX/NPS4; the whole GPU when left out.")
]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Of the weights; the model's own when left out.")]
ContextOption = Annotated[int, typer.Option(help="Tokens per sequence, prompt and answer.", min=1)]
KvDtypeOption = Annotated[KvDtype, typer.Option(help="Of the KV cache.")]
AllocModeOption = Annotated[
    AllocMode, typer.Option(help="CAPPING: a device reports its share; ALL: all of its memory partition.")
]
RootOption = Annotated[
    Path | None, typer.Option(help="A recorded tree: a mirror of / or /sys, a folder with KFD's nodes/ or `<bdf>/`.")
]
AmdSmiOption = Annotated[list[Path] | None, typer.Option(help="Saved `amd-smi … --json` output; may be repeated.")]
NodeOption = Annotated[Path | None, typer.Option("--node", help="An emulation file (`aim-profile node export`).")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write to this file instead of stdout.")]
ReferenceArgument = Annotated[
    str, typer.Argument(help="ORG/MODEL/PROFILE-ID, a profile's file, or a model together with --gpu.")
]


def guarded(verb: Callable[[], int]) -> NoReturn:
    """Run a verb and leave with its exit code; what it refuses is one line on stderr."""
    try:
        code = verb()
    except AimProfileError as problem:
        print_error(str(problem))
        from .derive import NoSuchProfileError

        code = DOES_NOT_FIT if isinstance(problem, NoSuchProfileError) else BAD_INPUT
    raise typer.Exit(code)


@app.command()
def gpus(
    name: Annotated[str | None, typer.Argument(help="One GPU, with every mode and its source.")] = None,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """Accelerators: XCDs, memory and the partition modes AMD validates or the driver accepts.

    Example: `aim-profile gpus MI300X --deployment sr-iov`
    """
    from . import verbs_facts

    guarded(lambda: verbs_facts.gpus(output, name, deployment))


@app.command()
def models(
    model: Annotated[
        str | None, typer.Argument(help="A model id, a directory with a config.json, or a GGUF file.")
    ] = None,
    output: OutputOption = "table",
) -> None:
    """Known models: parameters, weights and KV cache per token; or those of your own files.

    Example: `aim-profile models Qwen/Qwen3-32B`
    """
    from . import verbs_facts

    guarded(lambda: verbs_facts.models(output, model))


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
    from . import verbs_facts

    guarded(lambda: verbs_facts.node(output, verbs_facts.find_node(root, amd_smi or (), node)))


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
    from . import verbs_facts

    guarded(lambda: verbs_facts.export(verbs_facts.find_node(root, amd_smi or (), node), file))


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="A model id, a directory with a config.json, or a GGUF file.")],
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    memory: Annotated[str | None, typer.Option(help="Instead of --gpu: what the device holds, as in 24GiB.")] = None,
    precision: PrecisionOption = None,
    context: ContextOption = 8192,
    concurrency: Annotated[int, typer.Option(help="Sequences of that length at once.", min=1)] = 1,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", "--tp", help="Devices together.", min=1)] = 1,
    kv_dtype: KvDtypeOption = "auto",
    utilization: Annotated[float, typer.Option(help="Share of the device the engine may take.")] = 0.90,
    lora_slots: Annotated[int, typer.Option(help="LoRA adapters resident at once.", min=0)] = 0,
    lora_rank: Annotated[int, typer.Option(help="Their highest rank.", min=1)] = 16,
    encoder_tokens: Annotated[int, typer.Option(help="Image tokens a sequence keeps (Llama Vision).", min=0)] = 0,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """Does a model fit a device? Exit 0 with the headroom, or 1 with the shortfall and what would fit.

    Example: `aim-profile fit meta-llama/Llama-3.1-8B-Instruct --gpu MI300X --partition CPX/NPS4 --context 32768`
    """
    from . import verbs_facts

    guarded(
        lambda: verbs_facts.fit(
            output,
            model,
            gpu=gpu,
            partition=partition,
            memory=memory,
            deployment=deployment,
            precision=precision,
            context=context,
            concurrency=concurrency,
            tp=tensor_parallel,
            kv_dtype=kv_dtype,
            utilization=utilization,
            lora_slots=lora_slots,
            lora_rank=lora_rank,
            encoder_tokens=encoder_tokens,
        )
    )


@app.command("list")
def list_profiles(
    gpu: Annotated[str, typer.Option(help="A GPU of the catalogue.")] = "MI300X",
    model: Annotated[str | None, typer.Option(help="One model only.")] = None,
    precision: PrecisionOption = None,
    every_mode: Annotated[
        bool, typer.Option("--every-mode", help="Each partition mode, not only the smallest validated one that fits.")
    ] = False,
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """Profiles that can be derived: every model × precision on the smallest device that holds it.

    Known models without enough facts, and what fits nowhere, are named on stderr.
    Example: `aim-profile list --gpu MI355X --every-mode`
    """
    from . import verbs_profiles

    guarded(
        lambda: verbs_profiles.list_profiles(
            output, gpu=gpu, deployment=deployment, model=model, precision=precision, everything=every_mode
        )
    )


@app.command()
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
    from . import verbs_facts, verbs_profiles
    from .selection import Wish

    def verb() -> int:
        devices = (
            verbs_profiles.named_devices(gpu, partition, count, deployment, alloc_mode)
            if gpu is not None
            else verbs_profiles.devices_of(verbs_facts.find_node(root, (), node), card)
        )
        return verbs_profiles.select_profile(output, model, devices, Wish(engine, metric, precision), profiles)

    guarded(verb)


@app.command()
def show(
    profile: ReferenceArgument,
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    precision: PrecisionOption = None,
    metric: Annotated[Metric, typer.Option(help="What to tune for.")] = "latency",
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
    deployment: DeploymentOption = "bare-metal",
    output: OutputOption = "table",
) -> None:
    """One profile: engine arguments, environment, memory, and how sure it is.

    Example: `aim-profile show meta-llama/Llama-3.1-8B-Instruct/vllm-mi300x-cpx-nps4-bf16-tp1-latency`
    """
    from . import verbs_profiles

    def verb() -> int:
        wanted = verbs_profiles.wanted(
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
        found = verbs_profiles.find_profile(profile, wanted, partition, gpu, deployment)
        return verbs_profiles.show_profile(output, found)

    guarded(verb)


@app.command()
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
    deployment: DeploymentOption = "bare-metal",
) -> None:
    """Write a profile as a file. For more options, `aim-profile show … -o yaml` gives the same as `--form ours`.

    Example: `aim-profile export Qwen/Qwen3-8B/vllm-mi300x-fp8-tp1-latency --form aim --dir profiles/`
    """
    from . import verbs_profiles

    def verb() -> int:
        wanted = verbs_profiles.wanted(precision=precision)
        found = verbs_profiles.find_profile(profile, wanted, partition, gpu, deployment)
        return verbs_profiles.export_profile(found, form, out, folder)

    guarded(verb)


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="Profiles in any form.")], output: OutputOption = "table"
) -> None:
    """Hold profiles against the facts: form, partition, memory. Exit 1 if one contradicts them, 2 if malformed.

    Example: `aim-profile validate profiles/*.yaml`
    """
    from . import verbs_profiles

    guarded(lambda: verbs_profiles.validate(output, files))


@app.command()
def schema(
    kind: Annotated[SchemaKind, typer.Argument(help="The kind of file.")] = "profile",
) -> None:
    """Print the JSON Schema of a file, for editors and pipelines.

    Example: `aim-profile schema profile > profile.schema.json`
    """
    from . import verbs_profiles

    guarded(lambda: verbs_profiles.schema(kind))


@app.command()
def plan(
    fleet: Annotated[
        str, typer.Argument(help="A fleet file, an emulation file, a recorded tree, or `live`: this machine.")
    ],
    workloads: Annotated[Path, typer.Argument(help="A workloads file.")],
    tier: Annotated[Tier, typer.Option(help="The least a partition mode must be.")] = "validated",
    allow_mixed_compute: Annotated[
        bool, typer.Option("--allow-mixed-compute", help="Cards of one node in different compute modes.")
    ] = False,
    current: Annotated[Path | None, typer.Option(help="What runs now, as a plan: it stays where it is.")] = None,
    allow_eviction: Annotated[
        bool, typer.Option("--allow-eviction", help="With --current: low priority may move or stop for others.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Prove the best plan by OR-Tools' CP-SAT.")] = False,
    exact_time_limit: Annotated[float, typer.Option(help="Seconds for each level of its objective.", min=0.01)] = 10.0,
    svg: Annotated[Path | None, typer.Option(help="Draw the fleet into this file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this file too (.json: as JSON).")] = None,
    output: OutputOption = "table",
) -> None:
    """Give every replica its device and every card its mode. Exit 1 if a replica has none, with what would help.

    Example: `aim-profile plan fleet.yaml workloads.yaml --out plan.yaml --svg plan.svg`
    """
    from . import verbs_plans
    from .plan import PlanOptions

    def verb() -> int:
        options = PlanOptions(
            tier=tier,
            allow_mixed_compute=allow_mixed_compute,
            allow_eviction=allow_eviction,
            exact=exact,
            exact_time_limit_s=exact_time_limit,
        )
        return verbs_plans.plan(output, fleet, workloads, options, current=current, svg=svg, out=out)

    guarded(verb)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="A plan.")],
    new: Annotated[Path, typer.Argument(help="Another plan.")],
    output: OutputOption = "table",
) -> None:
    """What the new plan changes: modes of cards, replicas that come, go or move. Exit 1 if anything.

    Example: `aim-profile diff yesterday.yaml plan.yaml`
    """
    from . import verbs_steps

    guarded(lambda: verbs_steps.diff(output, old, new))


@app.command("assert")
def assert_plan(
    plan: Annotated[Path, typer.Argument(help="A plan.")],
    root: RootOption = None,
    amd_smi: AmdSmiOption = None,
    node: NodeOption = None,
    name: Annotated[str | None, typer.Option(help="The node's name in the plan; its own when left out.")] = None,
    output: OutputOption = "table",
) -> None:
    """Is this node as planned? Exit 1 and what is not: cards, modes, partitions, memory.

    Example: `aim-profile assert plan.yaml` on the node itself, or `--node node.yaml` for a recorded one.
    """
    from . import verbs_facts, verbs_steps

    guarded(lambda: verbs_steps.assert_plan(output, plan, verbs_facts.find_node(root, amd_smi or (), node), name))


@app.command()
def steps(
    current: Annotated[Path, typer.Argument(help="What is now: a plan, or a fleet or emulation file: nothing runs.")],
    plan: Annotated[Path, typer.Argument(help="The plan to reach.")],
    max_parallel: Annotated[int, typer.Option(help="Nodes drained at once.", min=1)] = 1,
    surge: Annotated[int, typer.Option(help="Replicas that may run twice for a moment while they move.", min=0)] = 0,
    output: OutputOption = "table",
) -> None:
    """The way to a plan: drain, switch, verify by read-back, place, undrain, node by node.

    Example: `aim-profile steps fleet.yaml plan.yaml --max-parallel 2`
    """
    from . import verbs_steps

    guarded(lambda: verbs_steps.steps(output, current, plan, max_parallel, surge))


@app.command()
def render(
    source: Annotated[
        str, typer.Argument(help="A plan's file, a profile's file, ORG/MODEL/PROFILE-ID, or a model with --gpu.")
    ],
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Of the InferenceServices.")] = None,
    strategy: Annotated[Strategy, typer.Option(help="The device plugin's resource naming strategy.")] = "mixed",
    image: Annotated[str | None, typer.Option(help="The runtime's image.")] = None,
    operator_namespace: Annotated[
        str, typer.Option(help="With a plan: where the GPU operator runs, for its ConfigMap.")
    ] = "kube-amd-gpu",
    storage_uri: Annotated[
        list[str] | None, typer.Option(help="NAME=URI of a model that is not on the hub; may be repeated.")
    ] = None,
    workloads: Annotated[Path | None, typer.Option(help="With a plan: its workloads (KV cache type, LoRA).")] = None,
    name: Annotated[str | None, typer.Option(help="With a profile: the InferenceService's name.")] = None,
    replicas: Annotated[int, typer.Option(help="With a profile.", min=1)] = 1,
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    deployment: DeploymentOption = "bare-metal",
    out: OutOption = None,
) -> None:
    """Write a plan or a profile as KServe objects: ClusterServingRuntime, InferenceService, and a plan's ConfigMap.

    Example: `aim-profile render plan.yaml -n llm | kubectl apply -f -`
    """
    from . import verbs_plans
    from .render import Target

    guarded(
        lambda: verbs_plans.render(
            source,
            Target(namespace, strategy, image, operator_namespace),
            workloads=workloads,
            storage_uris=verbs_plans.storage_uris(storage_uri or ()),
            name=name,
            replicas=replicas,
            gpu=gpu,
            partition=partition,
            deployment=deployment,
            out=out,
        )
    )
