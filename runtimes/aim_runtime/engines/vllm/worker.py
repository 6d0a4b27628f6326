"""What we ask of vLLM's workers, in their processes: vLLM mixes this class into its own."""

from __future__ import annotations

from typing import Any


class AdapterModules:
    """vLLM leaves out, without a word, what of an adapter has no place in the model."""

    model_runner: Any

    def adapter_modules(self, adapter_id: int) -> tuple[list[str], list[str]]:
        """The modules of a loaded adapter that have a place in this worker's part of the model, and those that have
        none. Packed modules count as one (``qkv_proj``)."""
        manager = self.model_runner.lora_manager._adapter_manager
        held = set(manager.get_adapter(adapter_id).loras)
        places = {key for name in manager.modules for key in (name, name.removeprefix("model."))}
        return sorted(held & places), sorted(held - places)
