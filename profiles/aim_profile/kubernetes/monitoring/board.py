"""Grafana's dashboards by its own typed builders: panels of queries to one Prometheus, as JSON.

The builders are of Grafana 10.1's schema, which newer Grafanas take. What they leave out is filled in by Grafana.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Literal, NamedTuple

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import TableCellHeight
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

#: Grafana's names of units.
Unit = Literal["short", "s", "bytes", "percentunit", "reqps", "ops", "none"]
_DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT, _LOW = 24, 8, 4


class Query(NamedTuple):
    """legend: `{{label}}` stands for the label's value."""

    expr: str
    legend: str = ""


class Panel(NamedTuple):
    """One picture. kind: lines over time, the newest number, or the newest series as rows of a table."""

    title: str
    queries: Sequence[Query]
    unit: Unit = "short"
    kind: Literal["lines", "number", "rows"] = "lines"
    says: str = ""


class Variable(NamedTuple):
    """What is chosen above: the values of a label of a metric; queries compare by `=~"$NAME"`."""

    name: str
    metric: str


class Board(NamedTuple):
    """A dashboard: rows of panels under headings."""

    uid: str
    title: str
    says: str
    variables: Sequence[Variable]
    rows: Sequence[tuple[str, Sequence[Panel]]]

    @property
    def panels(self) -> list[Panel]:
        """All of them."""
        return [panel for _, panels in self.rows for panel in panels]


def as_json(board: Board, mark: str) -> str:
    """The dashboard as Grafana imports it. mark: its description begins with that."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(f"{mark} {board.says}")
        .tags(["aim"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for variable in board.variables:
        made = made.with_variable(_variable(variable))
    for title, panels in board.rows:
        made = made.with_row(dashboard.Row(title))
        for panel in panels:
            made = made.with_panel(_panel(panel, _WIDTH // min(4, len(panels))))
    written = json.loads(JSONEncoder().encode(made.build()))
    # Named first: by it a generated file is known.
    ordered = {"description": written.pop("description"), **dict(sorted(_without_null(written).items()))}
    return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"


def _variable(variable: Variable) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable.name)
        .datasource(_DATASOURCE)
        .query(f"label_values({variable.metric}, {variable.name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .multi(True)
        .all_value(".*")
    )


def _panel(panel: Panel, width: int) -> timeseries.Panel | stat.Panel | table.Panel:
    made: timeseries.Panel | stat.Panel | table.Panel
    if panel.kind == "lines":
        made = timeseries.Panel().fill_opacity(10).min(0)
    elif panel.kind == "number":
        made = stat.Panel()
    else:
        made = table.Panel().cell_height(TableCellHeight.SM)
    made = made.title(panel.title).datasource(_DATASOURCE).unit(panel.unit).span(width)
    made = made.height(_LOW if panel.kind == "number" else _HEIGHT)
    if panel.says:
        made = made.description(panel.says)
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        made = made.with_target(_target(query, letter, panel.kind))
    return made


def _target(query: Query, letter: str, kind: str) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).ref_id(letter).datasource(_DATASOURCE)
    if query.legend:
        made = made.legend_format(query.legend)
    if kind == "lines":
        return made.range()
    made = made.instant()
    return made.format(PromQueryFormat.TABLE) if kind == "rows" else made


def _without_null(value: object) -> dict[str, object]:
    """Grafana reads what is not there as its default, and null as a value."""
    cleaned = _cleaned(value)
    assert isinstance(cleaned, dict)
    return cleaned


def _cleaned(value: object) -> object:
    if isinstance(value, dict):
        return {key: _cleaned(each) for key, each in value.items() if each is not None}
    return [_cleaned(each) for each in value] if isinstance(value, list) else value
