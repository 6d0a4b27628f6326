"""Sharing a served name's requests out among variants, the same caller always to the same one.

Weighted rendezvous hashing: each variant draws a number from the key, the highest wins. A variant that comes, goes or
changes its weight moves only the callers that it wins or loses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from aim_kserve.access import current_log
from aim_kserve.errors import Unavailable
from aim_kserve.kserve import InferRequest, InferResponse, Model
from aim_runtime.engines.base import Json, RequestContext, Stream
from aim_runtime.kserve_api import INPUTS, OUTPUTS
from aim_runtime.metrics import Metrics
from aim_runtime.model import RuntimeModel
from aim_runtime.models.entry import VariantEntry
from aim_runtime.models.held import Held

USER_HEADER = "x-user-id"
#: Of a response: which variant has answered.
VARIANT_HEADER = "x-model-variant"


@dataclass(frozen=True, slots=True)
class Route:
    """The model that answers a request. ``variant``: its name, where the one that was asked for has variants."""

    model: RuntimeModel
    variant: str = ""
    counted_by: Metrics | None = None

    async def call(self, operation: str, body: Json, context: RequestContext) -> Json | Stream:
        """See :meth:`RuntimeModel.call`."""
        if self.variant:
            body = {**body, "model": self.variant}
        return await self.model.call(operation, body, context, counted_by=self.counted_by)


class Split:
    """A served name with variants.

    Args:
        held: variant → what is held of it.
    """

    def __init__(self, entry: VariantEntry, held: Mapping[str, Held]) -> None:
        self.entry = entry
        self._held = held

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def ready(self) -> dict[str, float]:
        """The variants that can answer now → their weights."""
        return {name: weight for name, weight in self.entry.weights.items() if not self._held[name].trouble}

    @property
    def models(self) -> list[RuntimeModel]:
        return [held.model for held in self._held.values() if held.model is not None]

    def route(self, key: str) -> Route | None:
        """The variant for who asks, among those that can answer: only the callers of one that cannot move. None where
        none can."""
        ready = self.ready
        if not ready:
            return None
        held = self._held[choose(ready, key)]
        assert held.model is not None  # it is ready
        return Route(held.model, held.name, held.counted_as(self.name))

    def card(self) -> list[Json]:
        ready = self.ready
        return [{"name": name, "weight": weight, "ready": name in ready} for name, weight in self.entry.weights.items()]


class SplitModel(Model):  # type: ignore[misc]  # KServe ships no types
    """A served name with variants on KServe's routes. The variant is in a response header, over REST."""

    def __init__(self, name: str, split: Split) -> None:
        super().__init__(name, return_response_headers=True)
        self._split = split

    async def healthy(self) -> bool:
        return bool(self._split.ready)

    def alive(self) -> bool:
        models = self._split.models
        return not models or any(model.alive() for model in models)

    def load(self) -> bool:
        return bool(self._split.ready)

    async def predict(
        self,
        payload: Any,
        headers: Mapping[str, str] | None = None,
        response_headers: MutableMapping[str, str] | None = None,
    ) -> Json | InferResponse:
        given = payload.parameters if isinstance(payload, InferRequest) else _parameters(payload)
        asked = RequestContext(current_log().unique_id, headers or {})
        route = self._split.route(sticky_key(given or {}, asked))
        if route is None:
            raise no_variant(self._split)
        if response_headers is not None:
            response_headers[VARIANT_HEADER] = route.variant.encode().decode("latin-1")  # sent as the UTF-8 it is
        return await route.model.predict_as(self.name, payload, headers or {}, counted_by=route.counted_by)

    def get_input_types(self) -> list[Json]:
        return INPUTS

    def get_output_types(self) -> list[Json]:
        return OUTPUTS


def no_variant(split: Split) -> Unavailable:
    names = ", ".join(split.entry.weights)
    return Unavailable(f"model {split.name}: none of its variants is ready ({names})", code="no_variant_ready")


def _parameters(payload: Any) -> Json:
    found = payload.get("parameters") if isinstance(payload, dict) else None
    return found if isinstance(found, dict) else {}


def sticky_key(body: Mapping[str, Any], context: RequestContext) -> str:
    """Who asks: the body's ``user``, else the header ``x-user-id``, else this request only."""
    user = body.get("user")
    if isinstance(user, str) and user:
        return user
    return context.headers.get(USER_HEADER) or context.request_id


def choose(weights: Mapping[str, float], key: str) -> str:
    """One of ``weights`` (variant → weight > 0), by ``key``.

    Each wins with probability weight / sum (Efraimidis and Spirakis, 2006: ln(u) / weight, u uniform in (0, 1)).
    """
    return max(weights, key=lambda name: math.log(_uniform(name, key)) / weights[name])


def _uniform(name: str, key: str) -> float:
    digest = blake2b(f"{name}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) + 0.5) / 2**64
