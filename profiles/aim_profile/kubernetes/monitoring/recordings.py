"""Series that dashboards and alerts share: latencies, and what models cost."""

from __future__ import annotations

from .rule import Group, Recording

_WHO = "namespace, model_name"
_TWO = "compute_mode, memory_mode"
_MODES = f"node, {_TWO}"
TTFT_P95 = "namespace_model:aim_time_to_first_token_seconds:p95"
GUARDRAIL_P99 = "namespace:guardrail_overhead_seconds:p99"
SHARE = "node_card_partition:aim_compute_units:share"
GPUS = "namespace_model:aim_gpus:sum"
GPU_SECONDS = "namespace_model:aim_gpu_seconds:sum1h"
TOKENS = "namespace_model:aim_tokens:rate5m"
GPU_COST = "namespace_model:aim_gpu_cost_per_hour:sum"
TOKEN_COST = "namespace_model:aim_token_price_per_hour:sum"
TENANT_TOKENS = "namespace_tenant_model:aim_tokens:rate5m"
TENANT_SHARE = "namespace_tenant_model:aim_tokens:share"
TENANT_GPU_SECONDS = "namespace_tenant_model:aim_gpu_seconds:sum1h"
TENANT_GPU_COST = "namespace_tenant_model:aim_gpu_cost_per_hour:sum"
TENANT_TOKEN_COST = "namespace_tenant_model:aim_token_price_per_hour:sum"
_TENANT_GPUS = "namespace_tenant_model:aim_gpus:sum"
COST_PER_MILLION = "namespace_model:aim_cost_per_million_tokens:ratio"
_DEVICE_SHARE = "node_mode:aim_compute_units:share"
_DEVICE_PRICE = "node_mode:aim_device_price_per_hour:max"
#: Of the costs' group: sums over time count samples, each of which stands for so long.
COST_INTERVAL_S = 60


def latencies() -> Group:
    """Quantiles of what users and the guardrail wait."""
    return Group(
        "aim-latency",
        [
            Recording(TTFT_P95, _quantile(0.95, "aim_time_to_first_token_seconds", _WHO)),
            Recording(GUARDRAIL_P99, _quantile(0.99, "guardrail_overhead_seconds", "namespace, use_case, direction")),
        ],
    )


def costs() -> Group:
    """GPUs held, tokens and money, by namespace and model.

    A device is worth its share of its card's compute units. In a pod a device's indices are the pod's own, so a model's
    devices are known by node and mode: devices of one mode on one node are equal. A device that several models of one
    process share counts for each by its part.
    """
    held = (
        "aim_model_device_info / on (namespace, pod, instance, card, partition) group_left () "
        "count by (namespace, pod, instance, card, partition) (aim_model_device_info)"
    )
    # An exporter that is started again is two for a while.
    units = "max by (node, card, partition) (aim_partition_compute_units)"
    modes = f"on (node, card) group_left ({_TWO}) max by (node, card, {_TWO}) (aim_card_info)"
    price = "on (node, card) group_left (currency) max by (node, card, currency) (aim_price_per_gpu_hour)"
    of_device = f"* on ({_MODES}) group_left"
    token_price = "max by (model_name, kind, currency) (aim_price_per_million_tokens)"
    return Group(
        "aim-cost",
        [
            Recording(SHARE, f"{units} / on (node, card) group_left () sum by (node, card) ({units})"),
            Recording(_DEVICE_SHARE, f"max by ({_MODES}) ({SHARE} * {modes})"),
            Recording(_DEVICE_PRICE, f"max by ({_MODES}, currency) ({SHARE} * {price} * {modes})"),
            Recording(GPUS, f"sum by ({_WHO}) (({held}) {of_device} () {_DEVICE_SHARE})"),
            Recording(GPU_SECONDS, f"sum_over_time({GPUS}[1h]) * {COST_INTERVAL_S}"),
            Recording(GPU_COST, f"sum by ({_WHO}, currency) (({held}) {of_device} (currency) {_DEVICE_PRICE})"),
            _tokens("prompt"),
            _tokens("generation"),
            Recording(
                TOKEN_COST,
                f"sum by ({_WHO}, currency) ({TOKENS} * 3600 / 1e6 "
                f"* on (model_name, kind) group_left (currency) {token_price})",
            ),
            Recording(
                COST_PER_MILLION,
                f"{GPU_COST} / on ({_WHO}) group_left () (sum by ({_WHO}) ({TOKENS}) * 3600 / 1e6 > 0)",
            ),
        ],
        interval=f"{COST_INTERVAL_S}s",
    )


def tenants() -> Group:
    """The same by the tenant of the caller's key or token. What a model's devices cost is divided by the tokens of the
    last five minutes; of a model that nobody asked then, no tenant pays."""
    who, model = "namespace, tenant, model_name", "on (namespace, model_name)"
    taken = f"sum by ({who}) ({TENANT_TOKENS})"
    price = "on (model_name, kind) group_left (currency) max by (model_name, kind, currency)"
    return Group(
        "aim-tenant-cost",
        [
            Recording(TENANT_TOKENS, f"sum by ({who}, kind) (rate(aim_tenant_tokens_total[5m]))"),
            Recording(TENANT_SHARE, f"{taken} / {model} group_left () (sum by ({_WHO}) ({TENANT_TOKENS}) > 0)"),
            Recording(_TENANT_GPUS, f"{TENANT_SHARE} * {model} group_left () {GPUS}"),
            Recording(TENANT_GPU_SECONDS, f"sum_over_time({_TENANT_GPUS}[1h]) * {COST_INTERVAL_S}"),
            Recording(TENANT_GPU_COST, f"{TENANT_SHARE} * {model} group_left (currency) {GPU_COST}"),
            Recording(
                TENANT_TOKEN_COST,
                f"sum by ({who}, currency) ({TENANT_TOKENS} * 3600 / 1e6 * {price} (aim_price_per_million_tokens))",
            ),
        ],
        interval=f"{COST_INTERVAL_S}s",
    )


def _tokens(kind: str) -> Recording:
    return Recording(TOKENS, f"sum by ({_WHO}) (rate(aim_{kind}_tokens_total[5m]))", {"kind": kind})


def _quantile(share: float, histogram: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({histogram}_bucket[5m])))"
