"""The four dashboards: fleet and partitions, serving and SLO, guardrails, training."""

from __future__ import annotations

from .board import Board, Panel, Query, Unit, Variable
from .recordings import (
    COST_PER_MILLION,
    GPU_COST,
    GPU_SECONDS,
    GPUS,
    GUARDRAIL_P99,
    TENANT_GPU_COST,
    TENANT_GPU_SECONDS,
    TENANT_TOKEN_COST,
    TENANT_TOKENS,
    TOKEN_COST,
    TTFT_P95,
)

_RATE = "$__rate_interval"
_MODEL = 'namespace=~"$namespace", model_name=~"$model_name"'
_BY_MODEL = "{{namespace}}/{{model_name}}"
_HERE = 'namespace=~"$namespace"'
_ON_NODE = 'node=~"$node"'
_OF_RESOURCE = "on (node, card, partition) group_left (resource) aim_partition_info"
_RESOURCE = "{{node}} {{resource}}"
_BY_WINDOW = "{{model_name}} {{class}} {{window}}"


def _lines(title: str, expr: str, legend: str, unit: Unit = "short", says: str = "") -> Panel:
    return Panel(title, [Query(expr, legend)], unit, "lines", says)


def _rows(title: str, expr: str, says: str = "") -> Panel:
    return Panel(title, [Query(expr)], "short", "rows", says)


def _number(title: str, expr: str) -> Panel:
    return Panel(title, [Query(expr)], "short", "number")


def _by_caller() -> str:
    calls = 'aim_identity_requests_total{namespace=~"$namespace"}'
    return f"sum by (credential, outcome) (rate({calls}[{_RATE}]))"


def _sum_rate(counter: str) -> str:
    return f"sum by (model_name) (rate({counter}{{{_MODEL}}}[{_RATE}]))"


def _quantiles(title: str, histogram: str) -> Panel:
    def at(share: float) -> Query:
        rates = f"sum by (le, model_name, variant) (rate({histogram}_bucket{{{_MODEL}}}[{_RATE}]))"
        return Query(f"histogram_quantile({share}, {rates})", f"{{{{model_name}}}} {{{{variant}}}} p{share * 100:g}")

    return Panel(title, [at(0.5), at(0.95)], "s")


def _rate(counter: str, by: str) -> str:
    return f"sum by ({by}) (rate({counter}{{{_HERE}}}[{_RATE}]))"


def _quantile(share: float, histogram: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({histogram}_bucket{{{_HERE}}}[{_RATE}])))"


def _shown(title: str, metric: str, unit: Unit = "short", legend: str = "{{pod}}") -> Panel:
    return _lines(title, f"{metric}{{{_HERE}}}", legend, unit)


def _costs() -> list[Panel]:
    over_time = f'sum_over_time({GPU_COST}{{namespace=~"$namespace"}}[$__range])'
    spent = f"sum by (namespace, model_name, currency) ({over_time}) / 60"
    currency = f"{_BY_MODEL} {{{{currency}}}}"
    return [
        _rows("GPU cost in the time shown", spent, "A sample a minute, each of it worth a minute."),
        _lines("GPU cost per hour", f'{GPU_COST}{{namespace=~"$namespace"}}', currency),
        _lines("GPU seconds in the last hour", f'{GPU_SECONDS}{{namespace=~"$namespace"}}', _BY_MODEL, "s"),
        Panel(
            "Tokens: price per hour, and GPU cost of a million",
            [
                Query(f'{TOKEN_COST}{{namespace=~"$namespace"}}', f"{currency} an hour, by the table"),
                Query(f'{COST_PER_MILLION}{{namespace=~"$namespace"}}', f"{currency} a million, by GPU time"),
            ],
        ),
    ]


def _tenants() -> list[Panel]:
    here, tenant = '{namespace=~"$namespace"}', "{{tenant}} {{model_name}}"
    return [
        _lines("Tokens per second", f"{TENANT_TOKENS}{here}", f"{tenant} {{{{kind}}}}", "ops"),
        _lines(
            "GPU seconds in the last hour", f"{TENANT_GPU_SECONDS}{here}", tenant, "s", "By their share of the tokens."
        ),
        _lines("GPU cost per hour", f"{TENANT_GPU_COST}{here}", f"{tenant} {{{{currency}}}}"),
        _lines("Tokens: price per hour", f"{TENANT_TOKEN_COST}{here}", f"{tenant} {{{{currency}}}}"),
    ]


def _operator() -> list[Panel]:
    took, by = "aim_partition_switch_seconds", "sum by (from, to, phase)"
    reviews = "sum by (webhook, outcome) (rate(aim_operator_admission_reviews_total"
    pods = "sum by (namespace, policy, state) (aim_operator_guardrail_policy_pods"
    return [
        _number("Replicas that lead", "sum(aim_operator_leads)"),
        _rows("Switches: mean seconds in each phase", f"{by} ({took}_sum) / {by} ({took}_count)"),
        _lines("Services looked at", f"{reviews}[{_RATE}]))", "{{webhook}} {{outcome}}", "reqps"),
        _lines("Pods by the version of their policy", f"{pods}{{{_HERE}}})", "{{namespace}}/{{policy}} {{state}}"),
    ]


FLEET = Board(
    "aim-fleet",
    "AIM: fleet and partitions",
    "Cards, partitions, who is on them, what is not as planned, what it costs.",
    [Variable("node", "aim_node_info"), Variable("namespace", "aim_model_device_info")],
    [
        (
            "Cards",
            [
                _number("Cards", f"count(aim_card_info{{{_ON_NODE}}})"),
                _number("Partitions", f"count(aim_partition_info{{{_ON_NODE}}})"),
                _number("Differences from the plan", f"sum(aim_plan_differences{{{_ON_NODE}}})"),
                _number(
                    "Sources that cannot be read",
                    f"count(aim_node_source_ok{{{_ON_NODE}}}) - sum(aim_node_source_ok{{{_ON_NODE}}})",
                ),
            ],
        ),
        (
            "Partitions",
            [
                _rows("Modes", f"count by (node, product, compute_mode, memory_mode) (aim_card_info{{{_ON_NODE}}})"),
                _rows("Not as planned", f"aim_plan_drift{{{_ON_NODE}}}"),
                _lines(
                    "Devices by resource", f"count by (node, resource) (aim_partition_info{{{_ON_NODE}}})", _RESOURCE
                ),
                _lines(
                    "Memory by resource",
                    f"sum by (node, resource) (aim_partition_memory_total_bytes{{{_ON_NODE}}} * {_OF_RESOURCE})",
                    _RESOURCE,
                    "bytes",
                ),
            ],
        ),
        (
            "Use",
            [
                _lines(
                    "Memory in use, of each card",
                    f"aim_card_memory_used_bytes{{{_ON_NODE}}} / aim_card_memory_total_bytes",
                    "{{node}} card {{card}}",
                    "percentunit",
                    "Engines take most of a card at their start; how much of it works is the KV cache's figure.",
                ),
                _lines(
                    "Memory as the runtime watches it",
                    'aim_memory_used_bytes{namespace=~"$namespace"} / aim_memory_total_bytes',
                    "{{pod}} {{scope}} {{card}} {{partition}}",
                    "percentunit",
                ),
                _lines("GPUs held", f'{GPUS}{{namespace=~"$namespace"}}', _BY_MODEL),
                _rows("Models on devices", 'aim_model_device_info{namespace=~"$namespace"}'),
            ],
        ),
        ("Cost", _costs()),
        ("Cost by tenant", _tenants()),
        ("Operator", _operator()),
    ],
)

SERVING = Board(
    "aim-serving",
    "AIM: serving and SLO",
    "Requests, latencies, queues, service levels, engines.",
    [Variable("namespace", "aim_requests_running"), Variable("model_name", "aim_requests_running")],
    [
        (
            "Requests",
            [
                _lines(
                    "By status",
                    f"sum by (model_name, status) (rate(aim_requests_total{{{_MODEL}}}[{_RATE}]))",
                    "{{model_name}} {{status}}",
                    "reqps",
                ),
                _lines(
                    "By caller",
                    _by_caller(),
                    "{{credential}} {{outcome}}",
                    "reqps",
                ),
                Panel(
                    "Tokens per second",
                    [
                        Query(_sum_rate("aim_prompt_tokens_total"), "{{model_name}} prompt"),
                        Query(_sum_rate("aim_cached_prompt_tokens_total"), "{{model_name}} prompt, cached"),
                        Query(_sum_rate("aim_generation_tokens_total"), "{{model_name}} generated"),
                    ],
                    "ops",
                ),
            ],
        ),
        (
            "Latency",
            [
                _lines("Time to first token, p95 of 5 minutes", f"{TTFT_P95}{{{_MODEL}}}", _BY_MODEL, "s"),
                _quantiles("Time to first token", "aim_time_to_first_token_seconds"),
                _quantiles("Between tokens", "aim_inter_token_latency_seconds"),
                _quantiles("Whole request", "aim_request_duration_seconds"),
            ],
        ),
        (
            "Queue",
            [
                Panel(
                    "Running, waiting, slots",
                    [
                        Query(f"sum by (model_name) (aim_requests_running{{{_MODEL}}})", "{{model_name}} running"),
                        Query(f"sum by (model_name) (aim_requests_waiting{{{_MODEL}}})", "{{model_name}} waiting"),
                        Query(f"sum by (model_name) (aim_engine_slots{{{_MODEL}}})", "{{model_name}} slots"),
                    ],
                ),
                _lines(
                    "Waiting by class and tenant",
                    f"sum by (model_name, class, tenant) (aim_qos_waiting{{{_MODEL}}})",
                    "{{model_name}} {{class}} {{tenant}}",
                ),
                _lines(
                    "Refused",
                    f"sum by (model_name, class, reason) (rate(aim_qos_rejections_total{{{_MODEL}}}[{_RATE}]))",
                    "{{model_name}} {{class}} {{reason}}",
                    "reqps",
                ),
                _lines(
                    "KV cache in use",
                    f"aim_kv_cache_usage_ratio{{{_MODEL}}}",
                    "{{model_name}} {{replica}}",
                    "percentunit",
                ),
            ],
        ),
        (
            "Service levels",
            [
                _lines("Promises kept", f"aim_slo_attainment_ratio{{{_MODEL}}}", _BY_WINDOW, "percentunit"),
                _lines("Error budget: times faster than it may", f"aim_slo_burn_rate{{{_MODEL}}}", _BY_WINDOW),
                _lines("Held back", f"aim_qos_throttled{{{_MODEL}}}", "{{model_name}} {{class}}"),
            ],
        ),
        (
            "Engines",
            [
                _rows("Models", f"aim_model_state{{{_MODEL}}}"),
                _rows("Engines", f"aim_engine_state{{{_MODEL}}}"),
                Panel(
                    "Restarts and stalls",
                    [
                        Query(
                            f"increase(aim_engine_restarts_total{{{_MODEL}}}[$__range])",
                            "{{model_name}} {{replica}} restarts",
                        ),
                        Query(f"aim_engine_stalled_seconds{{{_MODEL}}}", "{{model_name}} {{replica}} stalled, s"),
                    ],
                ),
                _lines("Time to load", f"aim_model_load_seconds{{{_MODEL}}}", "{{model_name}} {{replica}}", "s"),
            ],
        ),
        (
            "Model cache",
            [
                _lines("Free on the volume", 'aim_cache_free_bytes{namespace=~"$namespace"}', "{{pod}}", "bytes"),
                _lines("Taken by models", 'aim_cache_size_bytes{namespace=~"$namespace"}', "{{pod}}", "bytes"),
                _lines("Hits", 'aim_cache_hit_ratio{namespace=~"$namespace"}', "{{pod}}", "percentunit"),
            ],
        ),
    ],
)

GUARDRAILS = Board(
    "aim-guardrails",
    "AIM: guardrails",
    "What is checked, found, refused, how long it takes and what fails.",
    [Variable("namespace", "guardrail_policy_info")],
    [
        (
            "Verdicts",
            [
                _lines(
                    "Prompts and answers",
                    _rate("guardrail_requests_total", "direction, decision"),
                    "{{direction}} {{decision}}",
                    "reqps",
                ),
                _lines(
                    "Found",
                    _rate("guardrail_detections_total", "family, label, action"),
                    "{{family}} {{label}} {{action}}",
                    "ops",
                ),
                _rows("Policies in force", f"guardrail_policy_info{{{_HERE}}}"),
            ],
        ),
        (
            "Time",
            [
                _lines(
                    "All checks of a text, p99 of 5 minutes",
                    f"{GUARDRAIL_P99}{{{_HERE}}}",
                    "{{namespace}} {{use_case}} {{direction}}",
                    "s",
                ),
                Panel(
                    "All checks of a text",
                    [
                        Query(
                            _quantile(share, "guardrail_overhead_seconds", "direction"),
                            f"{{{{direction}}}} p{share * 100:g}",
                        )
                        for share in (0.5, 0.95, 0.99)
                    ],
                    "s",
                ),
                _lines(
                    "Batch detectors, p95",
                    _quantile(0.95, "guardrail_detector_duration_seconds", "detector"),
                    "{{detector}}",
                    "s",
                ),
                _lines(
                    "Streams: text held back, p95",
                    _quantile(0.95, "guardrail_stream_hold_seconds", "namespace"),
                    "{{namespace}}",
                    "s",
                ),
            ],
        ),
        (
            "Failures",
            [
                Panel(
                    "Detectors",
                    [
                        Query(_rate("guardrail_errors_total", "detector, reason"), "{{detector}} failed: {{reason}}"),
                        Query(_rate("guardrail_timeouts_total", "detector, outcome"), "{{detector}} late: {{outcome}}"),
                        Query(_rate("guardrail_skipped_total", "detector, reason"), "{{detector}} skipped: {{reason}}"),
                    ],
                    "ops",
                ),
                _lines("Over budget", _rate("guardrail_budget_exceeded_total", "use_case"), "{{use_case}}", "ops"),
                _lines(
                    "Predictor did not answer",
                    _rate("guardrail_upstream_errors_total", "reason"),
                    "{{reason}}",
                    "ops",
                ),
                _lines(
                    "Limits of traffic",
                    _rate("guardrail_ratelimit_total", "limit, result"),
                    "{{limit}} {{result}}",
                    "ops",
                ),
            ],
        ),
        (
            "Load",
            [
                _lines(
                    "Verdicts remembered",
                    _rate("guardrail_cache_total", "tier, result"),
                    "{{tier}} {{result}}",
                    "ops",
                ),
                _lines("Waiting for a classifier", f"guardrail_queue_depth{{{_HERE}}}", "{{pod}}"),
                _lines("Given up and running on", f"guardrail_abandoned_calls{{{_HERE}}}", "{{pod}}"),
                _lines("Connections to the predictor", f"guardrail_upstream_connections{{{_HERE}}}", "{{pod}}"),
            ],
        ),
    ],
)

TRAINING = Board(
    "aim-training",
    "AIM: training",
    "Fine-tuning runs: how far, how fast, how well, and what a crash would cost.",
    [Variable("namespace", "aim_trainer_run_info")],
    [
        (
            "Runs",
            [
                _rows("What is trained", f"aim_trainer_run_info{{{_HERE}}}"),
                _lines("Done", f"aim_trainer_step{{{_HERE}}} / aim_trainer_planned_steps", "{{pod}}", "percentunit"),
                _shown("Time left", "aim_trainer_eta_seconds", "s"),
                _shown("Passes over the data", "aim_trainer_epoch"),
            ],
        ),
        (
            "Learning",
            [
                _shown("Loss", "aim_trainer_loss"),
                _shown("On held-out rows", "aim_trainer_evaluation", legend="{{pod}} {{metric}}"),
                _shown("Norm of the gradients", "aim_trainer_gradient_norm"),
                _shown("Learning rate", "aim_trainer_learning_rate", "none"),
            ],
        ),
        (
            "Speed",
            [
                _shown("Tokens per second, last step", "aim_trainer_tokens_per_second", "ops"),
                Panel(
                    "Tokens per second, over time",
                    [
                        Query(f"rate(aim_trainer_tokens_total{{{_HERE}}}[{_RATE}])", "{{pod}} computed"),
                        Query(f"rate(aim_trainer_trained_tokens_total{{{_HERE}}}[{_RATE}])", "{{pod}} in the loss"),
                    ],
                    "ops",
                ),
                _shown("Memory of a GPU, at most", "aim_trainer_gpu_memory_bytes", "bytes"),
            ],
        ),
        (
            "Checkpoints",
            [
                _shown("Age of the last", "aim_trainer_checkpoint_age_seconds", "s"),
                _shown("Its step", "aim_trainer_checkpoint_step"),
                _shown("Its size", "aim_trainer_checkpoint_size_bytes", "bytes"),
                _shown("Time it took", "aim_trainer_checkpoint_save_seconds", "s"),
            ],
        ),
    ],
)

BOARDS = (FLEET, SERVING, GUARDRAILS, TRAINING)
