"""Three times what the embedded model can serve, from four tenants with keys: order, refusals and deadlines, for real.

What a busy machine can break is not looked at here: how many seconds it took. ``make soak`` does so, for longer and
beside peers (``bench/qos_soak.py``).
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from qos_load import TENANTS, Sent, Side, Sizes, key_folder, of, overtaken, refused_after_s, unclean
from served import Served

SLOTS = 4
SIZES = Sizes.of("lognormal:16:0.7", "lognormal:5:0.7")
SECONDS, KNEE_SECONDS = 8.0, 2.0
DEADLINE_S = 4.0  # of low
LATE_S = 4.0  # so late a busy machine may tell it


async def test_overload_is_served_in_order_and_refused_cleanly(embedded_model: Path, tmp_path: Path):
    keys, policy = key_folder(tmp_path), tmp_path / "policy.json"
    low = {"slo": {"ttft_ms": 1e3 * DEADLINE_S}, "max_waiting": 8}
    policy.write_text(json.dumps({"version": 1, "ageing_s": 600, "classes": {"low": low}}))
    model = ["--model_name", "smollm2", "--model_dir", str(embedded_model.parent), "--threads", "1"]
    flags = ["--max_model_len", "1024", "--max_concurrency", str(SLOTS), "--api_keys", str(keys)]
    with Served(["-m", "aim_runtime", *model, *flags, "--qos_policy", str(policy)]) as server:
        async with Side(server.url, server.process.pid, key_file=keys) as side:
            sent = await overload(side)
        classes = {(line["tenant"], line["class"]) for line in server.access_lines() if "class" in line}
    refused = [each for each in sent if each.outcome.refusal]
    print(
        f"\n{len(sent)} sent, {sum(each.answered for each in sent)} answered, {len(refused)} refused; "
        f"high overtaken {statistics.mean(overtaken(sent)):.1f} times on average"
    )
    assert unclean(sent) == []
    assert refused
    assert {each.qos_class for each in refused} == {"low"}
    high = of(sent, "high")
    assert sum(each.answered for each in high) >= 0.7 * len(high), "high waits for its end"
    assert any(each.answered for each in of(sent, "low")), "low stands still"
    assert refused_after_s(sent) < DEADLINE_S + LATE_S
    assert statistics.median(overtaken(sent)) <= 2, "high waits for those below"
    assert {tenant for tenant, _ in classes} == {*TENANTS}
    assert {name for _, name in classes} == {"high", "low"}


async def overload(side: Side) -> list[Sent]:
    """A fifth of it high."""
    asks = [sent.ask for sent in side.asks("knee", 60, [("high", "ada", 5.0)], SIZES)]
    knee = await side.closed([("high", "ada", asks[number :: 2 * SLOTS]) for number in range(2 * SLOTS)], KNEE_SECONDS)
    knee_per_s = max(1.0, sum(each.answered for each in knee) / KNEE_SECONDS)
    shares = [(name, tenant, 3 * knee_per_s * share / 4) for name, share in SHARES for tenant in TENANTS]
    return await side.leg(side.asks("overload", SECONDS, shares, SIZES), SECONDS)


SHARES = (("high", 0.2), ("low", 0.8))
