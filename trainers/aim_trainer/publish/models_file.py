"""models.yaml: what `aim-runtime --models` needs to serve the version from its own directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aim_profile.files.write import dump

FILE, EMBEDDED = "models.yaml", "models-embedded.yaml"
_WHERE = "Served from this directory: cd here, then aim-runtime --models {file}"


def adapter_models(name: str, base: str, local: bool, rank: int, tokens: int) -> str:
    """The base model, the adapter beside it, which clients ask for as `name`. local: base is a path, else a hub id."""
    place = {"path": base} if local else {"uri": base if "://" in base else f"hf://{base}"}
    options = {"engine_args": {"max-lora-rank": rank}, "adapters": {name: "."}}
    served = {"name": f"{name}-base", **place, "engine": "vllm", "max_model_len": tokens, "options": options}
    note = "" if local else "\nThe base model comes from the cache: aim-runtime cache add, and --cache_path"
    return _file(FILE, served, note)


def merged_models(name: str, tokens: int) -> str:
    """The merged weights, by vLLM."""
    return _file(FILE, {"name": name, "path": ".", "engine": "vllm", "max_model_len": tokens})


def gguf_models(name: str, file: str, tokens: int) -> str:
    """The GGUF file, by the embedded engine."""
    return _file(EMBEDDED, {"name": name, "path": file, "engine": "llama_cpp", "max_model_len": tokens})


def is_local(model_id: str) -> bool:
    """Whether the job named files of this machine."""
    return model_id.startswith("file://") or Path(model_id).exists()


def local_path(model_id: str) -> str:
    """Absolute, as the runtime is started elsewhere."""
    return str(Path(model_id.removeprefix("file://")).resolve())


def _file(name: str, served: dict[str, Any], note: str = "") -> str:
    return dump({"version": 1, "models": [served]}, _WHERE.format(file=name) + note)
