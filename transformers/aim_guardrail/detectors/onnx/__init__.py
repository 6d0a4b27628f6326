"""Classifiers in ONNX Runtime: a Hugging Face directory in, scores of every label out.

    classifier = TextClassifier.read(Path("/models/toxic-bert"))       # blocking; ModelError: one line to show
    scores = await classifier.classify(["one text", "another"], deadline_s)
    scores[0]                                                          # of each label its best window: score and span

The only folder that imports onnxruntime and tokenizers, and only when a model is read.
"""

from __future__ import annotations

from aim_guardrail.detectors.onnx.batches import Batches, Overloaded
from aim_guardrail.detectors.onnx.classifier import Score, TextClassifier
from aim_guardrail.detectors.onnx.directory import ModelError
from aim_guardrail.detectors.onnx.windows import Window

__all__ = ["Batches", "ModelError", "Overloaded", "Score", "TextClassifier", "Window"]
