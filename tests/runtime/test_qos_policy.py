"""The policy file: read strictly; what is wrong is named with its line, key and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aim_runtime.qos.policy import ClassPolicy, Enforcement, Limit, QosPolicy, QosPolicyError, SloPolicy
from aim_runtime.qos.request import CLASSES

PAGE = Path(__file__).parents[2] / "docs/qos.md"


def example() -> str:
    (found,) = re.findall(r"```yaml\n(version: 1\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def test_the_page_s_example_is_a_policy_and_says_something_of_every_key() -> None:
    policy = QosPolicy.parse(example(), "qos.yaml")
    assert policy.model_fields_set == set(QosPolicy.model_fields)
    assert set(policy.classes) == set(CLASSES)
    assert policy.of("high").slo == SloPolicy(ttft_ms=500.0, target=0.99)
    assert policy.weight("research") == 3.0
    assert policy.limits[0].qos_class == "low"


def test_the_page_names_every_key() -> None:
    words = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    keys = {
        *QosPolicy.model_fields,
        *ClassPolicy.model_fields,
        *SloPolicy.model_fields,
        *Enforcement.model_fields,
        *(field.alias or name for name, field in Limit.model_fields.items()),
    }
    assert keys - words == set()


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "qos.yaml"
    file.write_text("version: 1\nclasses: {low: {max_waiting: 3}}\n")
    policy = QosPolicy.read(file)
    assert (policy.of("low").max_waiting, policy.of("high").max_waiting) == (3, 256)
    assert [policy.ceiling(name) for name in CLASSES] == [1.0, 0.95, 0.9]
    assert policy.weight("anybody") == 1.0
    assert QosPolicy.parse("version: 1", "x") == QosPolicy.default()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("classes: {}", "q.yaml:1: version: Field required"),
        ("version: 2", "q.yaml:1: version: Input should be 1 (got 2)"),
        ("version: true", "q.yaml:1: version: Input should be 1"),
        ("version: 1.0", "q.yaml:1: version: Input should be 1"),
        ("version: 1\nclases: {}", "q.yaml:2: clases: unknown key; did you mean classes?"),
        ("version: 1\nclasses: {low: {max_wait: 1}}", "q.yaml:2: classes.low.max_wait: unknown key; did you mean max_"),
        ("version: 1\nclasses: {urgent: {}}", "Input should be 'high', 'medium' or 'low' (got 'urgent')"),
        ("version: 1\nclasses: {low: {kv_ceiling: 0}}", "classes.low.kv_ceiling: Input should be greater than 0"),
        ("version: 1\nclasses: {low: {kv_ceiling: '0.5'}}", "classes.low.kv_ceiling: Input should be a valid number"),
        ("version: 1\nclasses: {low: {max_waiting: 1.5}}", "classes.low.max_waiting: Input should be a valid integer"),
        (
            "version: 1\nclasses:\n  low: {kv_ceiling: 0.99}",
            "q.yaml:3: classes.low.kv_ceiling: low has 0.99, medium 0.95: give low no more than medium",
        ),
        (
            "version: 1\nclasses:\n  medium: {kv_ceiling: 0.5}",
            "q.yaml:3: classes.medium.kv_ceiling: low has 0.9, medium 0.5: give low no more than medium",
        ),
        (
            "version: 1\nclasses:\n  high: {reserve_slots: 2}\n  low: {reserve_slots: 1}",
            "q.yaml:4: classes.low.reserve_slots: low leaves 1 free, high 2: let low leave free at least as many",
        ),
        ("version: 1\nclasses: {high: {slo: {target: 0.9}}}", "classes.high.slo.ttft_ms: Field required"),
        (
            "version: 1\nclasses: {high: {slo: {ttft_ms: 5, target: 1}}}",
            "classes.high.slo.target: Input should be less",
        ),
        ("version: 1\ntenants: {a: {weight: 0}}", "tenants.a.weight: Input should be greater than or equal to 0.001"),
        (
            "version: 1\ntenants: {a: {weight: .nan}}",
            "tenants.a.weight: Input should be less than or equal to 1000 (got nan)",
        ),
        ("version: 1\nageing_s: .inf", "ageing_s: Input should be less than inf"),
        ("version: 1\nlimits: [{class: low}]", "limits[0]: limits nothing: give requests_per_minute or tokens_per_"),
        (
            "version: 1\nlimits: [{clas: low, requests_per_minute: 1}]",
            "limits[0].clas: unknown key; did you mean class?",
        ),
        ("version: 1\nfloor: 0.9", "floor: Input should be less than or equal to 0.5 (got 0.9)"),
        ("version: 1\npreemption: kill", "preemption: Input should be 'pause' or 'off' (got 'kill')"),
        ("version: 1\nenforcement: {throttle: high}", "enforcement.throttle: Input should be 'medium' or 'low'"),
        ("version: 1\nversion: 1", "q.yaml:2: version: given twice, first in line 1"),
        ("models: []", "q.yaml: looks like a models file (models: …); a QoS policy (classes: …) is needed here"),
        ("- 1", "q.yaml: a list, not a mapping: a QoS policy (classes: …) is needed here"),
        ("", "q.yaml: empty, not a mapping"),
        ("version: [", "q.yaml:2: not YAML"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(QosPolicyError) as refused:
        QosPolicy.parse(text, "q.yaml")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_file_is_an_error_of_the_policy(tmp_path: Path) -> None:
    with pytest.raises(QosPolicyError, match="No such file"):
        QosPolicy.read(tmp_path / "none.yaml")


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from([*QosPolicy.model_fields, *ClassPolicy.model_fields, *CLASSES, "class", "x"]),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    )
)
def test_anything_is_a_policy_or_one_line_that_says_why_not(value: object) -> None:
    try:
        policy = QosPolicy.parse(yaml.safe_dump(value), "q.yaml")
    except QosPolicyError as refused:
        said = str(refused)
        assert said.startswith("q.yaml")
    else:
        assert policy.version == 1
