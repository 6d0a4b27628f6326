"""The main path: settings → engine → model → server."""

from __future__ import annotations

import sys
from functools import partial

from aim_kserve.errors import StartupError
from aim_kserve.server import Server, log_to_stderr
from aim_runtime.choose import create_engine
from aim_runtime.engines.base import Engine
from aim_runtime.metrics import Metrics
from aim_runtime.model import RuntimeModel
from aim_runtime.openai_api import Operations, model_routes
from aim_runtime.settings import RuntimeSettings


def run(settings: RuntimeSettings) -> int:
    """Serve the model that ``settings`` name; returns the exit code."""
    log_to_stderr()
    try:
        engine = create_engine(settings)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  the one line a person or kubectl logs reads
        return 1
    return serve(settings, engine)


def serve(settings: RuntimeSettings, engine: Engine) -> int:
    """Serve ``engine`` until a signal: listen, load behind, answer, drain."""
    metrics = Metrics(settings.model_name, engine)
    model = RuntimeModel(settings.model_name, engine, metrics, strict_fields=settings.strict_fields)
    operations = partial(Operations, model=model, max_body_bytes=int(settings.max_body_mib * 1024**2))
    return Server(settings, model_routes(model), [operations]).run(model)
