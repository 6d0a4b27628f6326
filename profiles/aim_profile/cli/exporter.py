"""`aim-profile exporter`: its options, and what it looks at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aim_profile.errors import AimProfileError

from .device import find_node
from .options import FACTS, AmdSmiOption, NodeOption, RootOption, StrategyOption, guarded, refuse_beside
from .output import FITS, print_note, print_text

if TYPE_CHECKING:
    from aim_profile.exporter.observe import Observer

_LIVE = Path("/")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(rich_help_panel=FACTS)(exporter)


def exporter(
    root: RootOption = None,
    amd_smi: AmdSmiOption = None,
    node: NodeOption = None,
    name: Annotated[str | None, typer.Option(help="The node's name in series and plan; its own when left out.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan to hold the node against; followed.")] = None,
    prices: Annotated[Path | None, typer.Option(help="A price table; followed.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A folder where plan.yaml and prices.yaml may come and go: a mounted ConfigMap.")
    ] = None,
    strategy: StrategyOption = "mixed",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Its port; 0: a free one.", min=0, max=65535)] = 9402,
    once: Annotated[bool, typer.Option("--once", help="Print what a scrape would answer, and end.")] = False,
) -> None:
    """Cards, partitions, memory, drift from a plan and prices for Prometheus, read at each scrape. Holds no device.

    What is not known has no series.

    Example: `aim-profile exporter --plan plan.yaml --prices prices.yaml`
    """

    def verb() -> int:
        observer = _observer(root, tuple(amd_smi or ()), node, name, (plan, prices, config), strategy)
        try:
            from aim_profile.exporter.serve import exposition, serve
        except ImportError as problem:
            raise AimProfileError(
                "the exporter needs prometheus-client", field="exporter", remedy="pip install 'aim-kserve[exporter]'"
            ) from problem
        if once:
            print_text(exposition(observer))
        else:
            serve(observer, host, port, lambda at: print_note(f"http://{host}:{at}/metrics"))
        return FITS

    guarded(verb)


def _observer(
    root: Path | None,
    amd_smi: tuple[Path, ...],
    node: Path | None,
    name: str | None,
    files: tuple[Path | None, Path | None, Path | None],
    strategy: StrategyOption,
) -> Observer:
    """The options as one observer, their files read. Raises AimProfileError where one cannot be used."""
    from aim_profile.exporter.followed import Followed
    from aim_profile.exporter.observe import Observer
    from aim_profile.exporter.prices import load_prices
    from aim_profile.plans.plan import load_plan

    if node is not None:
        refuse_beside(f"--node {node}", {"root": root, "amd-smi": amd_smi or None})
    plan, prices, config = files
    if config is not None:
        refuse_beside(f"--config {config}", {"plan": plan, "prices": prices})
        plan, prices = config / "plan.yaml", config / "prices.yaml"
        if not config.is_dir():
            raise AimProfileError(
                f"--config {config}: no such folder",
                field="config",
                value=str(config),
                remedy="make it; it may be empty",
            )
    may_lack = config is not None
    emulated = node is not None or (root is None and bool(amd_smi))
    observer = Observer(
        lambda: find_node(root, amd_smi, node),
        None if emulated else root or _LIVE,
        name,
        plan=None if plan is None else Followed(plan, load_plan, may_lack=may_lack),
        prices=None if prices is None else Followed(prices, load_prices, may_lack=may_lack),
        strategy=strategy,
        complain=lambda text: print_note(f"aim-profile exporter: {' '.join(text.split())}"),
    )
    try:
        find_node(root, amd_smi, node)
    except AimProfileError as problem:
        # A kernel file may be whole at the next scrape; a place that is none stays none.
        if problem.field == "root" or emulated:
            raise
    return observer
