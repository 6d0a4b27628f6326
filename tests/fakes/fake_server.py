"""The real runtime server over the fake engine: ``python fake_server.py '{"token_s": 0.01}' <aim-runtime's flags>``.

``{"process": true, …}``: over the odd one in a process of its own, with its options and ``slots``. Besides,
``{"devices": [{"card": "0", …}]}``: where it says that it runs; ``{"cached": DIRECTORY}``: of a cache's entry, which is
counted as if its model were served.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson

from aim_kserve.log import log_to_stderr
from aim_runtime.cache.use import hold
from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import Engine, EngineSpec
from aim_runtime.models.entry import Launch
from aim_runtime.server import serve
from aim_runtime.settings import RuntimeSettings
from aim_runtime.supervisor import launch
from aim_runtime.supervisor.remote import RemoteEngine
from fake_engine import FakeEngine


def main() -> None:
    settings = RuntimeSettings.load(sys.argv[2:], prog="fake-server", description="tests only")
    log_to_stderr()
    options = orjson.loads(sys.argv[1])
    devices = tuple(Device(**each) for each in options.pop("devices", ()))
    if "cached" in options:
        hold(Path(options.pop("cached")))
    made = engine(settings.model_name, options)
    sys.exit(serve(settings, made, Launch(lambda: made, devices=devices)))


def engine(name: str, options: dict[str, Any]) -> Engine:
    if not options.pop("process", False):
        return FakeEngine(name, **options)
    launch.CHILD = "odd_child"
    slots = options.pop("slots", 8)
    return RemoteEngine(
        launch.Launch(EngineSpec("odd", Path("/nowhere"), name, max_concurrency=slots, options=options))
    )


if __name__ == "__main__":
    main()
