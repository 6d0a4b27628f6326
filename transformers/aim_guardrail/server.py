"""The main path: settings and policy → guard and upstream → model → server."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

from aim_guardrail.pipeline import Guard
from aim_guardrail.policy import Policy
from aim_guardrail.settings import GuardrailSettings


def run(settings: GuardrailSettings, policy: Policy) -> int:
    """Serve until a signal; returns the exit code."""
    guard = ThreadPoolExecutor(1, "guard").submit(Guard.load, policy)
    # The guard's engines and KServe load side by side: a second each.
    from aim_guardrail.credentials import Credentials
    from aim_guardrail.filter_api import routes
    from aim_guardrail.metrics import Metrics
    from aim_guardrail.predictor import Predictor
    from aim_guardrail.proxy import Proxy
    from aim_guardrail.transformer import GuardrailModel
    from aim_guardrail.upstream import Upstream
    from aim_kserve.identity.key_file import KeyFile
    from aim_kserve.log import log_to_stderr
    from aim_kserve.server import Server

    log_to_stderr()
    metrics = Metrics()
    metrics.policy(policy)
    own = settings.predictor_api_key_file
    key = None if own is None else KeyFile(own, "--predictor_api_key_file").follow()
    credentials = Credentials(settings.predictor_credentials, key)
    upstream = settings.predictor_host and Upstream(
        settings.predictor_host,
        metrics,
        use_ssl=settings.predictor_use_ssl,
        connect_timeout_s=settings.predictor_connect_timeout_seconds,
        silence_timeout_s=settings.predictor_request_timeout_seconds,
        retries=settings.predictor_request_retries,
        credentials=credentials,
    )
    model = GuardrailModel(settings, Predictor(settings, upstream or None, credentials), metrics, _awaitable(guard))
    max_body_bytes = int(settings.max_body_mib * 1024**2)
    return Server(
        settings, routes(model, metrics, max_body_bytes), [lambda app: Proxy(app, model, metrics, max_body_bytes)]
    ).run(model)


async def _awaitable(guard: Future[Guard]) -> Guard:
    return await asyncio.wrap_future(guard)
