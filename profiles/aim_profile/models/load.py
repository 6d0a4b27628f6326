"""Models: a catalogue id, a Hugging Face directory or a GGUF file becomes ModelFacts.

Ids are exact. An id that is not in the catalogue is refused, never guessed at from its name.
"""

from __future__ import annotations

from os.path import isdir, isfile
from pathlib import Path

from aim_profile.errors import ModelError

from .facts import Attention, Experts, Mla, ModelFacts, Precision, Shape
from .gguf import only_gguf, read_gguf
from .huggingface import read_directory
from .known import by_id, known_ids

__all__ = [
    "Attention",
    "Experts",
    "Mla",
    "ModelFacts",
    "Precision",
    "Shape",
    "by_id",
    "known_ids",
    "load_model",
    "read_directory",
    "read_gguf",
]


def load_model(reference: str | Path) -> ModelFacts:
    """A catalogue id, a directory with a config.json or a GGUF model, or a `.gguf` file, as facts.

    A relative path counts as a path when it exists. Raises UnknownModelError for an id that is not in
    the catalogue (naming the right id where one is known), ModelError for files that cannot be read.
    """
    path = Path(reference)
    # os.path says no, where Path raises, of a name that no file could have.
    if isdir(path):
        file = None if isfile(path / "config.json") else only_gguf(path)
        return read_directory(path) if file is None else read_gguf(file)
    if isfile(path):
        return read_gguf(path)
    if isinstance(reference, Path) or path.is_absolute() or path.suffix == ".gguf":
        raise ModelError(f"{path}: no such file or directory", field="model", value=str(reference))
    return by_id(str(reference))
