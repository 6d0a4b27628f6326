"""The real runtime server over several fake engines: ``python fake_models_server.py '{"models": {…}}' <flags>``.

``models``: name → ``{"engine": FakeEngine's options, "replicas": 2, ModelEntry's fields}``; ``variants``: name → its
weights; ``budget``: how many models fit at once; the other keys are Models' own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import orjson

from aim_kserve.errors import BadRequest
from aim_kserve.log import log_to_stderr
from aim_runtime.admin_api import migration_routes
from aim_runtime.model import State
from aim_runtime.models.directory import Models
from aim_runtime.models.entry import Launch, ModelEntry, VariantEntry
from aim_runtime.models.eviction import DoesNotFit
from aim_runtime.server import put_in_turn, serve_models
from aim_runtime.settings import RuntimeSettings
from aim_runtime.telemetry import Telemetry
from fake_engine import FakeEngine


def entry(name: str, options: dict[str, Any]) -> ModelEntry:
    create = partial(FakeEngine, name, **options.pop("engine", {}))
    replicas = options.pop("replicas", 1)
    launches = tuple(Launch(create, f"partition {index}") for index in range(replicas))
    return ModelEntry(name, launches, **{**options, "aliases": tuple(options.get("aliases", ()))})


def room_for(count: int, models: Callable[[], Models]) -> Any:
    """Each model takes one place of ``count``."""

    def admit(asked: ModelEntry, *, without: Collection[str] = ()) -> None:
        taken = {
            name
            for name, state in models().states().items()
            if state in (State.READY, State.UNLOADING) and name != asked.name
        }
        if len(taken - set(without)) >= count:
            raise DoesNotFit("needs 1.0 GiB, 0.0 GiB are free: 1.0 GiB short")

    return admit


def launch_at(name: str, card: int, partition: int) -> Launch:
    """Where a model may be moved to: partition 1 of card 0."""
    if (card, partition) != (0, 1):
        raise BadRequest(f"card {card} partition {partition} is not here: give card 0 partition 1")
    return Launch(partial(FakeEngine, name), f"card {card} partition {partition}")


def main() -> None:
    settings = RuntimeSettings.load(sys.argv[2:], prog="fake-models-server", description="tests only")
    log_to_stderr()
    options = orjson.loads(sys.argv[1])
    entries = [entry(name, given) for name, given in options.pop("models").items()]
    variants = [VariantEntry(name, weights) for name, weights in options.pop("variants", {}).items()]
    budget = options.pop("budget", len(entries))
    with Telemetry(settings) as telemetry:
        models = Models(
            entries,
            variants,
            admit=room_for(budget, lambda: models),
            audit=telemetry.audit,
            gate=telemetry.gate,
            in_turn=put_in_turn(settings),
            **options,
        )
        telemetry.show(models.states)
        code = serve_models(settings, models, migration_routes(models, launch_at))
    sys.exit(code)


if __name__ == "__main__":
    main()
