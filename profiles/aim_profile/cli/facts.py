"""The verbs about facts: gpus, models, node, fit. Each returns the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aim_profile.errors import AimProfileError
from aim_profile.gpus.catalog import Accelerator, Deployment, PartitionMode, by_name, catalog
from aim_profile.models.load import ModelFacts, by_id, known_ids, load_model
from aim_profile.nodes.read import Card, Node, export_node
from aim_profile.serving.profile import Metric
from aim_profile.sizing import llama_cpp
from aim_profile.sizing.alternatives import size_on, size_on_bytes, size_on_cpus
from aim_profile.sizing.fit import STEP_TOKENS, DoesNotFit, Fit, Option, default_context, make_request, weight_bytes
from aim_profile.sizing.kv_cache import kv_bytes_per_token, state_bytes_per_sequence
from aim_profile.units import MIB, gib

from .device import NamedDevice
from .output import DOES_NOT_FIT, FITS, Facts, Output, Table, print_note, show, write_out


def gpus(output: Output, name: str | None, deployment: Deployment) -> int:
    """Every accelerator, or one with all its modes."""
    if name is not None:
        return _one_gpu(output, by_name(name), deployment)
    known = list(catalog().values())
    rows = [_gpu_row(accelerator, deployment) for accelerator in known]
    columns = ("GPU", "gfx", "XCDs", "CUs", "HBM MiB", "PCI ids", "validated", "driver-legal")
    show(
        output,
        [_gpu_data(accelerator, deployment) for accelerator in known],
        Table(columns, rows, right=("XCDs", "CUs", "HBM MiB"), title=f"Deployment {deployment}"),
        _unverified(known),
    )
    return FITS


def _gpu_row(accelerator: Accelerator, deployment: Deployment) -> tuple[str, ...]:
    modes = accelerator.modes(deployment)
    return (
        accelerator.name + ("*" if accelerator.unverified else ""),
        accelerator.gfx,
        str(accelerator.xcds),
        str(accelerator.compute_units),
        str(accelerator.hbm_mib),
        " ".join(f"{known.id:04x}" for known in accelerator.pci_ids),
        " ".join(mode.label for mode in modes if mode.tier == "validated") or "-",
        " ".join(mode.label for mode in modes if mode.tier == "driver-legal") or "-",
    )


def _unverified(accelerators: Sequence[Accelerator]) -> str:
    doubtful = [f"{a.name}: {', '.join(a.unverified)}" for a in accelerators if a.unverified]
    return f"* not established: {'; '.join(doubtful)}" if doubtful else ""


def _gpu_data(accelerator: Accelerator, deployment: Deployment) -> dict[str, Any]:
    return {
        "name": accelerator.name,
        "gfx": accelerator.gfx,
        "pci_ids": [{"id": f"{known.id:#06x}", "function": known.function} for known in accelerator.pci_ids],
        "xcds": accelerator.xcds,
        "compute_units": accelerator.compute_units,
        "hbm_mib": accelerator.hbm_mib,
        "matrix_formats": list(accelerator.matrix_formats),
        "unverified": list(accelerator.unverified),
        "deployment": deployment,
        "modes": [_mode_data(mode) for mode in accelerator.modes(deployment, "unsupported")],
    }


def _mode_data(mode: PartitionMode) -> dict[str, Any]:
    return {
        "mode": mode.label,
        "tier": mode.tier,
        "partitions": mode.partitions,
        "compute_units": mode.cus,
        "memory_mib": mode.memory_mib,
        "resource": f"amd.com/{mode.resource_label}",
        "source": mode.source,
        "confidence": mode.confidence,
        "note": mode.note,
    }


def _one_gpu(output: Output, accelerator: Accelerator, deployment: Deployment) -> int:
    modes = accelerator.modes(deployment, "unsupported")
    facts = Facts(
        (
            ("GPU", f"{accelerator.name} ({accelerator.architecture}, {accelerator.gfx})"),
            ("XCDs", str(accelerator.xcds)),
            ("compute units", str(accelerator.compute_units)),
            ("HBM", f"{accelerator.hbm_mib} MiB"),
            ("PCI ids", ", ".join(f"{known.id:#06x} ({known.function})" for known in accelerator.pci_ids)),
            ("matrix formats", ", ".join(accelerator.matrix_formats)),
            ("not established", ", ".join(accelerator.unverified)),
            ("notes", "; ".join(accelerator.notes)),
        )
    )
    rows = [(m.label, m.tier, str(m.partitions), str(m.cus), str(m.memory_mib), m.source, m.note or "-") for m in modes]
    columns = ("mode", "tier", "devices", "CUs", "MiB", "source", "note")
    title = f"Modes, deployment {deployment}"
    show(
        output,
        _gpu_data(accelerator, deployment),
        facts,
        Table(columns, rows, right=("devices", "CUs", "MiB"), title=title),
    )
    return FITS


def models(output: Output, reference: str | None) -> int:
    """Every known model, or one with its facts."""
    found = [load_model(reference)] if reference else [by_id(name) for name in known_ids()]
    rows = [_model_row(model) for model in found]
    columns = (
        "model",
        "architecture",
        "params",
        "active",
        "native",
        "weights GiB",
        "KV B/token",
        "max context",
        "status",
    )
    table = Table(columns, rows, right=("params", "active", "weights GiB", "KV B/token", "max context"))
    data = [_model_data(model) for model in found]
    if reference is None:
        show(output, data, table)
        return FITS
    detail = Facts(
        (("source", found[0].source), ("confidence", found[0].confidence), ("notes", "; ".join(found[0].notes)))
    )
    show(output, data[0], table, detail)
    return FITS


def _model_row(model: ModelFacts) -> tuple[str, ...]:
    data = _model_data(model)
    counts = (model.total_params, model.active_params)
    return (
        model.id,
        model.architecture,
        *("unknown" if count is None else f"{count / 1e9:.2f}B" for count in counts),
        *(str(data[key]) if data[key] is not None else "unknown" for key in _MODEL_COLUMNS),
        model.status,
    )


_MODEL_COLUMNS = ("native_precision", "weights_gib", "kv_bytes_per_token", "max_positions")


def _model_data(model: ModelFacts) -> dict[str, Any]:
    """weights_gib: at the native precision; state_bytes_per_sequence: of linear attention, beside what tokens keep."""
    return {
        "id": model.id,
        "architecture": model.architecture,
        "parameters": model.total_params,
        "active_parameters": model.active_params,
        "prediction_parameters": model.prediction_params,
        "native_precision": model.native_precision,
        "weights_gib": _weights_gib(model),
        "kv_bytes_per_token": kv_bytes_per_token(model) if model.sizable else None,
        "state_bytes_per_sequence": state_bytes_per_sequence(model) if model.sizable else None,
        "max_positions": model.max_positions,
        "status": model.status,
        "source": model.source,
        "confidence": model.confidence,
        "notes": list(model.notes),
    }


def _weights_gib(model: ModelFacts) -> float | None:
    try:
        return gib(weight_bytes(model))
    except AimProfileError:
        return None


def node(output: Output, found: Node) -> int:
    """The node's cards and their partitions."""
    show(output, node_data(found), *_node_blocks(found))
    return FITS


def export(found: Node, file: Path | None) -> int:
    """The node as an emulation file, on stdout where no file is named."""
    write_out(export_node(found), file)
    return FITS


def node_data(found: Node) -> dict[str, Any]:
    """The node as JSON: every field of nodes.facts, unknown ones as null."""
    return found.model_dump(mode="json")


def _node_blocks(found: Node) -> tuple[Table | Facts, ...]:
    facts = Facts(
        (
            ("node", found.name or "unnamed"),
            ("deployment", found.deployment),
            ("read from", found.backend),
            ("cards", str(len(found.cards))),
            ("devices", str(found.devices)),
            ("notes", "; ".join(found.notes)),
        )
    )
    columns = (
        "card",
        "address",
        "PCI id",
        "product",
        "mode",
        "alloc",
        "hive",
        "NUMA",
        "devices",
        "CUs each",
        "MiB each",
    )
    rows = [_card_row(card) for card in found.cards]
    return facts, Table(columns, rows, right=("devices", "CUs each", "MiB each")), Facts(_remarks(found.cards))


def _remarks(cards: Sequence[Card]) -> list[tuple[str, str]]:
    """What is to be said about cards; what is the same for several is said once."""
    about: dict[str, list[int]] = {}
    for card in cards:
        for note in (*card.notes, card.report or ""):
            if note:
                about.setdefault(note, []).append(card.index)
    return [(f"card{'s' if len(which) > 1 else ''} {_ranges(which)}", note) for note, which in about.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _card_row(card: Card) -> tuple[str, ...]:
    return (
        str(card.index),
        card.bdf or ("-" if card.is_cpu else "unknown"),
        card.pci_id or ("-" if card.is_cpu else "unknown"),
        card.product,
        card.mode_text,
        card.alloc_mode or "-",
        "-" if card.hive_id is None else f"{card.hive_id:#x}",
        "-" if card.numa_node is None else str(card.numa_node),
        str(len(card.partitions)),
        _each([part.compute_units for part in card.partitions]),
        _each([part.memory_mib for part in card.partitions]),
    )


def _each(values: Sequence[int | None]) -> str:
    """One figure, or `49136 to 49152` where devices differ."""
    known = sorted({value for value in values if value is not None})
    if len(known) < 2:
        return str(known[0]) if known else "unknown"
    return f"{known[0]} to {known[-1]}"


FIT_FIELDS = (
    *(
        "fits",
        "model",
        "gpu",
        "mode",
        "tier",
        "precision",
        "context",
        "max_context",
        "context_limit",
        "max_num_batched_tokens",
        "weights_gib",
        "kv_bytes_per_token",
        "kv_gib",
        "overhead_gib",
        "budget_gib",
        "headroom_gib",
    ),
    *("max_concurrency", "shortfall_gib", "alternatives"),
)


def fit(
    output: Output, model_reference: str, on: NamedDevice, context: int | None, metric: Metric, **asked: Any
) -> int:
    """Whether a model fits that device. asked: the other fields of sizing.Request."""
    model = load_model(model_reference)
    asked["max_num_batched_tokens"] = STEP_TOKENS[metric]
    if on.cores is not None and model.gguf:
        asked |= {"engine": "llama_cpp", "max_num_batched_tokens": llama_cpp.STEP_TOKENS}
    request = make_request(context=context or default_context(model), **asked)
    mode = on.mode
    if on.cores is not None:
        sized = size_on_cpus(model, on.memory_bytes, request)
        cores = f"{on.cores or 'unknown'} core{'s' if on.cores != 1 else ''}"
        where = f"a CPU set of {cores} and {on.memory_bytes // MIB} MiB"
    elif mode is None:
        sized, where = size_on_bytes(model, on.memory_bytes, request), f"a device of {on.memory_bytes // MIB} MiB"
    else:
        sized = size_on(model, mode, by_name(mode.accelerator), request)
        many = f"{request.tp} x " if request.tp > 1 else ""
        unproven = ", tensor parallelism unproven" if mode.unproven(request.tp) else ""
        what = f"({mode.tier} on {mode.deployment}{unproven}): {mode.memory_mib} MiB, {mode.cus} CUs"
        where = f"{many}{mode.accelerator} {mode.label} {what}"
    unsupported = mode is not None and mode.tier == "unsupported"
    if mode is not None and unsupported:
        on_what = f"{mode.accelerator} {mode.label} is unsupported on {mode.deployment}"
        print_note(f"{on_what}: the answer is about memory alone")
    whole = sized.model_dump(mode="json") | {
        "gpu": mode.accelerator if mode else None,
        "mode": mode.label if mode else None,
        "tier": mode.tier if mode else None,
    }
    show(output, {key: whole[key] for key in FIT_FIELDS}, *_fit_blocks(sized, where))
    return FITS if sized.fits and not unsupported else DOES_NOT_FIT


_OVERHEADS = {
    "vllm": "2 % of the weights, 2.3 GiB of runtime",
    "llama_cpp": "llama.cpp: the process and a step's buffers",
}


def _fit_blocks(sized: Fit | DoesNotFit, where: str) -> tuple[Facts | Table | str, ...]:
    verdict = (
        f"fits, {sized.headroom_gib} GiB to spare"
        if sized.fits
        else f"does not fit, short by {sized.shortfall_gib} GiB"
    )
    each = " a device" if sized.tp > 1 else ""
    facts = Facts(
        (
            ("model", sized.model),
            ("verdict", verdict + each),
            ("on", where),
            (
                "asked",
                f"{sized.precision}, {sized.context} tokens, {sized.concurrency} at once, tensor parallel {sized.tp}",
            ),
            ("weights", f"{sized.weights_gib} GiB"),
            ("KV cache", f"{sized.kv_gib} GiB ({sized.kv_bytes_per_token} bytes a token, {sized.kv_dtype})"),
            ("overhead", f"{sized.overhead_gib} GiB ({_OVERHEADS[sized.engine]}, adapters)"),
            ("budget", f"{sized.budget_gib} GiB ({sized.utilization:.0%} of the device)"),
            ("max concurrency", f"{sized.max_concurrency} of {sized.context} tokens"),
            ("max context", f"{sized.max_context} tokens at {sized.concurrency}"),
            ("notes", "; ".join(sized.notes)),
        )
    )
    estimate = "An estimate: the engine's own start-up profiling is the last word."
    return facts, _alternatives(sized.alternatives), estimate


def _alternatives(options: Sequence[Option]) -> Table | str:
    if not options:
        return ""
    rows = [(option.kind, option.description, str(option.headroom_gib)) for option in options]
    return Table(("change", "what would fit", "headroom GiB"), rows, right=("headroom GiB",))
