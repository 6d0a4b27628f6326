"""A model's graph in ONNX Runtime. The only file that imports onnxruntime."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aim_guardrail.detectors.onnx.directory import ModelError

_DYNAMIC = b"DynamicQuantize"  # ...Linear, ...MatMul, ...LSTM
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
_WEIGHTS = "session.model_external_initializers_file_folder_path"


class Graph:
    """One graph, on one CPU thread for each run. Thread-safe.

    Attributes:
        inputs: what it takes: type, and dimensions (None where any size is).
        mixes_rows: whether what it says of a row depends on the rows beside it: dynamic quantisation has one scale for
            a whole batch (onnxruntime#10111), so a batch must be one row.
    """

    def __init__(self, model: Path | bytes, weights: Path | None = None) -> None:
        """``model``: a file, or what is in one; ``weights``: the folder of its external data, of the latter only.
        Blocking. Raises ModelError.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # it never gives back what one long text took
        options.enable_mem_pattern = False  # shapes differ from batch to batch
        options.log_severity_level = 4  # what fails is raised, too
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS, str(weights))
        file = model if isinstance(model, Path) else "model"
        given = str(model) if isinstance(model, Path) else model
        try:
            self._session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no common base
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{file}: not a model ONNX Runtime can run ({reason}): export it anew") from None
        self.inputs: dict[str, tuple[Any, list[int | None]]] = {
            each.name: (_type(file, each), [size if isinstance(size, int) else None for size in each.shape])
            for each in self._session.get_inputs()
        }
        self._output = self._session.get_outputs()[0].name
        self.mixes_rows = _has_dynamic_quantisation(model)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Its first output, as float32. `feeds`: an array for each of `inputs`."""
        (output,) = self._session.run([self._output], dict(feeds))
        return np.asarray(output, np.float32)


def _type(file: object, node: Any) -> Any:
    if node.type not in _TYPES:
        raise ModelError(f"{file}: input {node.name!r} is a {node.type}: use one of {', '.join(_TYPES)}")
    return _TYPES[node.type]


def _has_dynamic_quantisation(model: Path | bytes) -> bool:
    """Whether an operator's name says so: names stand in the file as they are; weights kept elsewhere do not matter."""
    if isinstance(model, bytes):
        return _DYNAMIC in model
    with model.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_DYNAMIC) >= 0
