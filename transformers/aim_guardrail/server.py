"""The main path: settings and policy → guard and upstream → model → server."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

from aim_guardrail.in_force import Generation, Policies, Reload
from aim_guardrail.policy import PolicySet
from aim_guardrail.settings import GuardrailSettings


def run(settings: GuardrailSettings, read: PolicySet) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        StartupError: the audit cannot be written, or spans not be sent; one line.
    """
    loading = ThreadPoolExecutor(1, "guard").submit(Generation.load, read)
    # The guards' engines and KServe load side by side: a second each.
    from aim_guardrail.audit.start import auditing
    from aim_guardrail.credentials import Credentials
    from aim_guardrail.feedback_api import feedback_routes
    from aim_guardrail.filter_api import routes
    from aim_guardrail.metrics import Metrics
    from aim_guardrail.pipeline.cache import VerdictCache
    from aim_guardrail.pipeline.shared_cache import SharedCache
    from aim_guardrail.predictor import Predictor
    from aim_guardrail.proxy import Proxy
    from aim_guardrail.review.recent import Recent
    from aim_guardrail.review.shadow import Shadow
    from aim_guardrail.tracing import tracing
    from aim_guardrail.traffic.gate import Traffic
    from aim_guardrail.transformer import GuardrailModel
    from aim_guardrail.upstream import Upstream
    from aim_kserve.identity.key_file import KeyFile
    from aim_kserve.log import log_to_stderr
    from aim_kserve.server import Server

    log_to_stderr()
    metrics = Metrics()
    policies = Policies(metrics)
    reload = Reload(settings.policy_paths, settings.read_policies, policies, metrics, settings.policy_poll_seconds)
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
    predictor = Predictor(settings, upstream or None, credentials)
    traffic = Traffic.of(settings, metrics)
    shared = None if settings.redis_url is None else SharedCache(settings.redis_url)
    held = settings.verdict_cache_entries
    cache = VerdictCache(held, settings.verdict_cache_ttl_seconds, shared) if held else None
    max_body_bytes = int(settings.max_body_mib * 1024**2)
    recent, shadow = Recent(), Shadow(policies, metrics, settings.shadow_sample, cache)
    with auditing(settings) as auditors, tracing(settings) as tracers:
        loaded = _in_force(loading, policies, reload)
        model = GuardrailModel(
            settings, predictor, metrics, policies, loaded, traffic, cache, [*auditors, *tracers, recent, shadow]
        )
        server = Server(
            settings,
            [*routes(model, metrics, max_body_bytes), *feedback_routes(recent, metrics, auditors)],
            [lambda app: Proxy(app, model, metrics, max_body_bytes, traffic)],
        )
        if settings.ext_proc_port is not None:
            from aim_guardrail.ext_proc.service import ExtProc

            behind = server.around(Proxy(None, model, metrics, max_body_bytes, traffic))
            model.ext_proc = ExtProc(behind, credentials, settings.host, settings.ext_proc_port, max_body_bytes)
        return server.run(model)


async def _in_force(loading: Future[Generation], policies: Policies, reload: Reload) -> None:
    await policies.put_in_force(await asyncio.wrap_future(loading))
    reload.start()
