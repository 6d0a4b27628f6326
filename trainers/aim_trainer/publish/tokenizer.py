"""Tokenizer, chat template and generation settings as engines read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aim_trainer.errors import JobError
from aim_trainer.places.open import open_file

from .turns import end_ids, without_markers

TEMPLATE = "chat_template.jinja"


def write_tokenizer(tokenizer: Any, template: str | None, into: Path) -> None:
    """template: the job's own, in place of the tokenizer's. Changes `tokenizer`: it has the served template then."""
    chosen = template if template is not None else tokenizer.chat_template
    if isinstance(chosen, dict):
        chosen = chosen.get("default")
    tokenizer.chat_template = without_markers(chosen) if chosen else None
    tokenizer.save_pretrained(into)


def write_generation(tokenizer: Any, before: dict[str, Any], into: Path) -> None:
    """generation_config.json: what the base model's said, and the end of the assistant's turn as the first eos.

    Without it vLLM does not stop where a chat model was taught to.
    """
    ends = end_ids(tokenizer, before.get("eos_token_id"))
    if not ends:
        why = "the tokenizer has no token that ends an answer: nothing would stop it"
        raise JobError(
            f"spec.baseModel.modelId: {why}", field="spec.baseModel.modelId", remedy="give its tokenizer an eos_token"
        )
    said = {name: value for name, value in before.items() if name not in ("transformers_version", "_from_model_config")}
    said |= {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    for name in ("bos_token_id", "pad_token_id"):
        value = said.get(name) if said.get(name) is not None else getattr(tokenizer, name)
        said |= {} if value is None else {name: value}
    (into / "generation_config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_template(uri: str | None) -> str | None:
    """The Jinja file that the job names. Raises StoreError."""
    if uri is None:
        return None
    place, name = open_file(uri)
    return place.read_bytes(name).decode()
