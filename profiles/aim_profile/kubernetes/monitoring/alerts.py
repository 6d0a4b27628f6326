"""The alerts: what each says and what is to be done. docs/monitoring.md has them as a table."""

from __future__ import annotations

from .recordings import GUARDRAIL_P99
from .rule import Alert, Group

_MODEL = "{{ $labels.namespace }}/{{ $labels.model_name }}"
_POD = "{{ $labels.namespace }}/{{ $labels.pod }}"
_BY_MODEL = "sum by (namespace, model_name)"


def _burn(long: str, short: str, over: float) -> str:
    """Google's SRE Workbook, chapter 5: over both windows, so that it ends soon after its cause has."""
    both = [f'aim_slo_burn_rate{{window="{window}"}} > {over:g}' for window in (long, short)]
    return f"{both[0]} and on (namespace, pod, model_name, class) {both[1]}"


def _grown(counter: str) -> str:
    """A counter that somebody counted up: its first count makes the series, of which increase() sees nothing."""
    return f"increase({counter}[15m]) > 0 or ({counter} unless {counter} offset 15m) > 0"


#: Of the runtime.
SERVING = Group(
    "aim-serving",
    [
        Alert(
            "AimTargetDown",
            "critical",
            "5m",
            'up{job=~"(.*/)?aim-(serving|exporter|operator)"} == 0',
            f"Prometheus cannot read {_POD} ({{{{ $labels.instance }}}}).",
            "Look at the pod. With identity on, a 401 or 403 says that the monitor's key lacks the scope metrics.",
        ),
        Alert(
            "AimModelFailed",
            "critical",
            "2m",
            'aim_model_state{state="failed"} == 1',
            f"{_MODEL} could not be loaded on {{{{ $labels.pod }}}}.",
            "Its reason is in the log and in /readyz/NAME of that pod.",
        ),
        Alert(
            "AimEngineDead",
            "critical",
            "2m",
            'aim_engine_state{state=~"failed|unreachable"} == 1',
            f"The engine of {_MODEL} on {{{{ $labels.pod }}}} is {{{{ $labels.state }}}}.",
            "failed: it ended too often, the log has its last words. unreachable: the server that somebody else "
            "runs (--server_url) does not answer.",
        ),
        Alert(
            "AimEngineRestarts",
            "warning",
            "0m",
            "increase(aim_engine_restarts_total[15m]) > 2",
            f"The engine of {_MODEL} on {{{{ $labels.pod }}}} keeps being started again.",
            "The log says why each ended. Out of memory: a smaller context or concurrency, or a larger partition.",
        ),
        Alert(
            "AimEngineStalled",
            "critical",
            "0m",
            "aim_engine_stalled_seconds > 60",
            f"The engine of {_MODEL} on {{{{ $labels.pod }}}} has work and makes no step.",
            "It is started again after --stall_timeout. If it comes back: aim-profile doctor on the node, dmesg.",
        ),
        Alert(
            "AimRequestsFail",
            "critical",
            "5m",
            f'{_BY_MODEL} (rate(aim_requests_total{{status=~"5.."}}[5m])) '
            f"/ {_BY_MODEL} (rate(aim_requests_total[5m])) > 0.05",
            f"More than one in twenty requests to {_MODEL} fails.",
            "The access log has status and request id of each. 503 with Retry-After: it is full, add replicas.",
        ),
        Alert(
            "AimQueueLong",
            "warning",
            "5m",
            f"{_BY_MODEL} (aim_requests_waiting) > {_BY_MODEL} (aim_engine_slots)",
            f"More requests wait for {_MODEL} than it computes at once.",
            "Add replicas or a larger partition: aim-profile plan. aim_qos_waiting says who waits.",
        ),
        Alert(
            "AimRequestsRefused",
            "warning",
            "5m",
            "sum by (namespace, model_name, class, reason) "
            '(rate(aim_qos_rejections_total{reason=~"queue_full|deadline|throttled"}[5m])) > 0',
            f"{_MODEL} refuses requests of class {{{{ $labels.class }}}}: {{{{ $labels.reason }}}}.",
            "It has no room for what it promised: add replicas, or promise less in the QoS policy.",
        ),
        Alert(
            "AimSloBurnFast",
            "critical",
            "2m",
            _burn("1h", "5m", 14.4),
            f"Class {{{{ $labels.class }}}} of {_MODEL} uses up a month's error budget in two days.",
            "See the dashboard for what is slow: queue, prefill or decode. Throttle lower classes, add replicas.",
        ),
        Alert(
            "AimSloBurnSlow",
            "warning",
            "1h",
            _burn("3d", "1h", 1),
            f"Class {{{{ $labels.class }}}} of {_MODEL} keeps less than was promised, over three days.",
            "Plan more devices for it (aim-profile plan), or promise what it can keep.",
        ),
        Alert(
            "AimMemoryNearlyFull",
            "warning",
            "5m",
            'aim_memory_used_bytes{scope!="card"} / aim_memory_total_bytes > 0.9',
            f"{{{{ $labels.scope }}}} memory of {_POD} is over 90 % in use.",
            "Raise the container's memory limit or lower context and concurrency, before requests are refused.",
        ),
        Alert(
            "AimMemoryFull",
            "critical",
            "1m",
            "aim_memory_admission_stopped == 1",
            f"{_POD} refuses requests: {{{{ $labels.scope }}}} memory is full.",
            "Of a card: something else is on it, or gpu_memory_utilization is too high. Else: a higher limit.",
        ),
        Alert(
            "AimKvCacheFull",
            "warning",
            "15m",
            "aim_kv_cache_usage_ratio > 0.95",
            f"The KV cache of {_MODEL} on {{{{ $labels.pod }}}} is full: requests wait or are computed again.",
            "Lower --max_model_len or concurrency, an fp8 KV cache, or a larger partition: aim-profile fit.",
        ),
        Alert(
            "AimModelCacheFull",
            "warning",
            "15m",
            "aim_cache_free_bytes / (aim_cache_free_bytes + aim_cache_size_bytes) < 0.1",
            f"The volume of the model cache of {_POD} is nearly full.",
            "aim-runtime cache prune removes what was not used for long; or a larger volume.",
        ),
        Alert(
            "AimCredentialsUnreadable",
            "warning",
            "10m",
            "aim_identity_source_ok == 0",
            f"{_POD} cannot read its {{{{ $labels.source }}}}: what was good before goes on counting.",
            "api_keys: the log names what is wrong in the file. jwks: the issuer does not answer.",
        ),
    ],
)

_CHECKED = "sum by (namespace) (rate(guardrail_requests_total[5m]))"
_OPEN = (
    'sum by (namespace, detector) (rate(guardrail_errors_total{reason="degraded"}[5m])) > 0 or '
    'sum by (namespace, detector) (rate(guardrail_timeouts_total{outcome="open"}[5m])) > 0'
)
#: Of the guardrail transformer.
GUARDRAIL = Group(
    "aim-guardrail",
    [
        Alert(
            "AimGuardrailErrors",
            "critical",
            "5m",
            f'sum by (namespace) (rate(guardrail_requests_total{{decision=~"error|timeout"}}[5m])) / {_CHECKED} > 0.01',
            "The guardrail of {{ $labels.namespace }} refuses more than 1 % for failures of its own.",
            "guardrail_errors_total and guardrail_timeouts_total name the detector: look at its server or model.",
        ),
        Alert(
            "AimGuardrailUnchecked",
            "critical",
            "5m",
            _OPEN,
            "Texts in {{ $labels.namespace }} pass without {{ $labels.detector }}: it fails, and its rule is open.",
            "Mend the detector, or close its rule: on_error and on_timeout: closed.",
        ),
        Alert(
            "AimGuardrailSlow",
            "warning",
            "10m",
            f"{GUARDRAIL_P99} > 0.5",
            "The guardrail of {{ $labels.namespace }} ({{ $labels.use_case }}) takes more than half a second "
            "of one in a hundred requests.",
            "guardrail_detector_duration_seconds names the detector. More replicas, a device, or a smaller model.",
        ),
        Alert(
            "AimGuardrailOverBudget",
            "warning",
            "10m",
            f"sum by (namespace) (rate(guardrail_budget_exceeded_total[5m])) / {_CHECKED} > 0.05",
            "Of one in twenty texts in {{ $labels.namespace }} the checks do not fit into the budget.",
            "Raise budget_ms, or make the slowest detector faster; what is not asked is skipped or refused.",
        ),
        Alert(
            "AimGuardrailPolicyRefused",
            "warning",
            "0m",
            _grown('guardrail_policy_reload_total{result!="ok"}'),
            f"{_POD} does not take a changed policy ({{{{ $labels.result }}}}): the one before stays in force.",
            "aim-guardrail policy validate FILE says what is wrong with it.",
        ),
        Alert(
            "AimGuardrailAuditLost",
            "critical",
            "0m",
            _grown("guardrail_audit_dropped_total"),
            f"{_POD} loses entries of its audit.",
            "Its disk is full, refuses writes, or is too slow: the log says which.",
        ),
    ],
)

#: Of fine-tuning runs.
TRAINING = Group(
    "aim-training",
    [
        Alert(
            "AimTrainingStalled",
            "critical",
            "5m",
            "changes(aim_trainer_step[30m]) == 0 and aim_trainer_step offset 30m "
            "and aim_trainer_step < aim_trainer_planned_steps",
            f"The run on {_POD} has made no step for half an hour.",
            "aim-trainer status and the pod's log: a worker that is away, a place of data that does not answer, "
            "a device that hangs. Stopped and started it goes on from its last checkpoint.",
        ),
        Alert(
            "AimTrainingCheckpointOld",
            "warning",
            "5m",
            "aim_trainer_checkpoint_age_seconds > 4 * 3600",
            f"The run on {_POD} has written no checkpoint for four hours, which a crash would cost.",
            "checkpoints.everySteps is large, or their place does not take them: the run's log says.",
        ),
    ],
)

#: Of nodes and their partitions.
FLEET = Group(
    "aim-fleet",
    [
        Alert(
            "AimPartitionDrift",
            "warning",
            "10m",
            "aim_plan_differences > 0",
            "Node {{ $labels.node }} is not as planned in {{ $value }} points.",
            "aim_plan_drift names each; aim-profile assert says both values, aim-profile steps the way back.",
        ),
        Alert(
            "AimNodeUnreadable",
            "warning",
            "10m",
            "aim_node_source_ok == 0",
            "The exporter on {{ $labels.node }} cannot read its {{ $labels.source }}.",
            "Its log says why. kernel: aim-profile doctor. plan: it is wrong, or lacks the node.",
        ),
    ],
)

#: Of the operator.
OPERATOR = Group(
    "aim-operator",
    [
        Alert(
            "AimOperatorLeaderless",
            "warning",
            "5m",
            "max by (job) (aim_operator_leads) == 0",
            "No replica of the operator leads: plans, policies and jobs are not kept.",
            "kubectl -n aim-system get lease aim-operator, and the log of each replica.",
        ),
        Alert(
            "AimAdmissionFails",
            "critical",
            "5m",
            'sum by (job, webhook) (rate(aim_operator_admission_reviews_total{outcome="failed"}[5m])) > 0',
            "The operator's webhook {{ $labels.webhook }} cannot ask the cluster: no service is made or changed.",
            "Its log says what it was refused: its role (manifests/operator), or an API server that does not answer.",
        ),
        Alert(
            "AimPolicyStale",
            "warning",
            "15m",
            'aim_operator_guardrail_policy_pods{state="stale"} > 0',
            "{{ $value }} pods in {{ $labels.namespace }} run an older version of policy {{ $labels.policy }}.",
            "kubectl describe guardrailpolicy names them; the log of each says why it did not take the new one.",
        ),
    ],
)
