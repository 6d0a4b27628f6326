"""Which engine serves the model that lies in a directory, and only that engine is imported."""

from __future__ import annotations

from pathlib import Path

from aim_kserve.errors import StartupError
from aim_runtime.assignment import Assignment, whole_number
from aim_runtime.engines import registry
from aim_runtime.engines.base import Engine, EngineSpec, ModelLoadError
from aim_runtime.settings import RuntimeSettings


def engine_of(settings: RuntimeSettings) -> str:
    """The engine for the model that ``settings`` name.

    Raises:
        StartupError: no model of a known format, or a setting belongs to another engine.
    """
    name = settings.engine if settings.engine != "auto" else detect(settings.model_dir)
    try:
        settings.refuse_for(name)
    except ValueError as error:
        raise StartupError(str(error)) from None
    return name


def create_engine(settings: RuntimeSettings, assignment: Assignment | None = None) -> Engine:
    """The engine for ``settings``, as it was assigned, not loaded yet.

    Raises:
        StartupError: no model of a known format, the engine is not installed, or a setting belongs to another one.
    """
    try:
        return registry.create(spec_of(settings, assignment))
    except ModelLoadError as error:
        raise StartupError(str(error)) from None


def spec_of(settings: RuntimeSettings, assignment: Assignment | None = None) -> EngineSpec:
    """What a process needs to build the engine. An assignment to devices decides tensor parallelism and memory; without
    one the settings do.

    Raises:
        StartupError: no model of a known format, or a setting belongs to another engine.
    """
    if assignment is None or not assignment.evidence.mode:  # nobody assigned anything: the settings decide
        engine = engine_of(settings) if assignment is None else assignment.engine
        given = settings.max_model_len, settings.max_concurrency
        return EngineSpec(engine, settings.model_dir, settings.model_name, *given, settings.engine_options(engine))
    flags, options = assignment.engine_args, settings.engine_options(assignment.engine)
    own = {name: value for name, value in flags.items() if name not in _OWN}
    if assignment.engine == "llama_cpp":
        concurrency = whole_number(flags, "max-concurrency")
        options |= {name.replace("-", "_"): value for name, value in own.items()}
    else:
        concurrency = whole_number(flags, "max-num-seqs")
        options["tensor_parallel_size"] = whole_number(flags, "tensor-parallel-size")
        if assignment.engine == "sglang":
            options["mem_fraction_static"] = own.pop("gpu-memory-utilization")
        options["engine_args"] = own
    context = whole_number(flags, "max-model-len")
    return EngineSpec(assignment.engine, assignment.model_dir, assignment.model, context, concurrency, options)


#: The flags that an engine has arguments of its own for.
_OWN = ("max-model-len", "max-num-seqs", "max-concurrency", "tensor-parallel-size")


def detect(model_dir: Path) -> str:
    """The one engine that serves what lies there: ``llama_cpp`` for GGUF, ``vllm`` for a Hugging Face directory with
    safetensors.

    Raises:
        StartupError: none does, or more than one; says what was looked for and where.
    """
    if not model_dir.exists():
        raise StartupError(f"--model_dir {model_dir}: no such file or directory")
    able = registry.serving(model_dir)
    if len(able) == 1:
        return able[0]
    kinds = registry.kinds()
    if able:
        held = " and ".join(f"{kinds[name].reads} ({name})" for name in able)
        raise StartupError(f"--model_dir {model_dir} holds {held}: choose with --engine")
    if model_dir.is_file():
        raise StartupError(f"--model_dir {model_dir}: not a .gguf file (and a safetensors model is a directory)")
    looked_for = " nor ".join(f"{kind.reads} (for {name})" for name, kind in kinds.items() if kind.reads)
    raise StartupError(f"--model_dir {model_dir}: found neither {looked_for}")
