"""Makes the embedded model: ``make convert-toxicity``, ``python -m toxicity_training.convert FOLDER [--to FOLDER]``.

Reads the weights and the tokenizer inside the package, writes `jigsaw.onnx`, `jigsaw.txt` (the words) and their digests
in `jigsaw.json`, whose other lines stay; says whether the files are those that were there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors import toxicity
from toxicity_training import graph, pickled

PACKAGE = "toxic_comment_classifier-0.3.0-py3-none-any.whl"
SHIPPED = Path(toxicity.__file__).parent

_LSTM = "layers/bidirectional/{}_layer/cell/vars/{}"
_PARTS = {"kernel": 0, "recurrent": 1, "bias": 2}
_NAMES = {
    "embedding": "layers/embedding/vars/0",
    **{f"{side}.{part}": _LSTM.format(side, at) for side in ("forward", "backward") for part, at in _PARTS.items()},
    "dense.kernel": "layers/dense/vars/0",
    "dense.bias": "layers/dense/vars/1",
    "output.kernel": "layers/dense_1/vars/0",
    "output.bias": "layers/dense_1/vars/1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the packages, as make convert-toxicity downloads them")
    parser.add_argument("--to", type=Path, default=SHIPPED, help="where the files go")
    options = parser.parse_args()
    with zipfile.ZipFile(options.folder / PACKAGE) as archive:
        model = graph.built(weights(archive.read("toxic_classifier/model/model.weights.h5")))
        words = pickled.words(archive.read("toxic_classifier/model/tokenizer.pickle"))
    files = {
        "jigsaw.onnx": model.SerializeToString(deterministic=True),
        "jigsaw.txt": "".join(f"{word}\n" for word in words).encode(),
    }
    for name, content in files.items():
        old = options.to / name
        same = old.is_file() and old.read_bytes() == content
        old.write_bytes(content)
        print(f"{old}: {len(content)} bytes, {'as it was' if same else 'NEW'}")
    card = options.to / "jigsaw.json"
    described = json.loads(card.read_text()) if card.is_file() else {}
    described["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    card.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def weights(raw: bytes) -> dict[str, NDArray[np.float32]]:
    """The arrays of a Keras weights file, by the names `graph.built` wants."""
    with h5py.File(io.BytesIO(raw), "r") as file:
        return {name: np.asarray(file[path], np.float32) for name, path in _NAMES.items()}


if __name__ == "__main__":
    main()
