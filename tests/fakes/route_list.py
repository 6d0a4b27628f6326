"""Every route of the real servers, as JSON lines: ``python route_list.py runtime|guardrail <the process's flags>``.

The process is made as ever, several models with run-time adapters and migration on; instead of serving, it tells what
its app would answer: ``{"methods": […], "path": "/v2/models/{model_name}/infer"}``.
"""

from __future__ import annotations

import sys
from typing import Any

import orjson
from starlette.routing import Route

from aim_kserve.kserve import kserve_app
from aim_kserve.server import Server


def tell(*_: Any, **__: Any) -> int:
    """In the place of :meth:`Server.run`."""
    for route in kserve_app.router.routes:
        if type(route).__name__ == "_Misspelt":  # matches what is no route, to refuse it
            continue
        assert isinstance(route, Route) or hasattr(route, "methods"), f"what is {route!r}?"
        _print(route.methods, route.path)  # type: ignore[union-attr]
    return 0


def _print(methods: Any, path: str) -> None:
    sys.stdout.write(orjson.dumps({"methods": sorted(methods), "path": path}).decode() + "\n")


def runtime(argv: list[str]) -> int:
    from aim_runtime.admin_api import migration_routes
    from aim_runtime.models.directory import Models
    from aim_runtime.openai_api import AT_THE_ROOT, ENDPOINTS, PREFIXES
    from aim_runtime.server import serve_models
    from aim_runtime.settings import RuntimeSettings
    from fake_models_server import entry, launch_at

    for operation in sorted(ENDPOINTS):  # before the router: openai_api.Operations
        for prefix in PREFIXES:
            _print(["POST"], f"{prefix}/{operation}")
    for path in AT_THE_ROOT:
        _print(["POST"], path)
    settings = RuntimeSettings.load(argv, {}, prog="routes", description="tests only")
    models = Models([entry(name, {}) for name in ("m", "other")])
    return serve_models(settings, models, migration_routes(models, launch_at))


def guardrail(argv: list[str]) -> int:
    from aim_guardrail.server import run
    from aim_guardrail.settings import GuardrailSettings

    settings = GuardrailSettings.load(argv, {}, prog="routes", description="tests only")
    return run(settings, settings.read_policies())


if __name__ == "__main__":
    Server.run = tell  # type: ignore[method-assign]
    sys.exit({"runtime": runtime, "guardrail": guardrail}[sys.argv[1]](sys.argv[2:]))
