"""A picture of a large fleet: a tile for each card, a cell for each of its devices, filled as far as it is needed.

Cells of one colour are one path, so that ten thousand cards stay a few megabytes; who stands where is in the tooltips
of the nodes, and in the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import sqrt
from typing import NamedTuple

from .svg import (
    GREY,
    INK,
    LINE,
    MARGIN,
    PAPER,
    PRIORITIES,
    STRONG,
    TINT,
    CardBox,
    Device,
    NodeBox,
    cut_name,
    document,
    escape,
    text,
)

CELL = 8
TILE_ROWS = 4
TILE_GAP = 4
NODE_HEAD = 14
NODE_GAP = 14
# Cards of a node side by side: a board's eight.
CARDS_PER_ROW = 8
LEAST_NODE_WIDTH = 92
MOST_KINDS = 24
_ASPECT = 1.7


class _Block(NamedTuple):
    """One node's place on the page, pixels."""

    node: NodeBox
    across: int
    width: float
    height: float


def overview(title: str, facts: str, nodes: Sequence[NodeBox]) -> str:
    """The fleet as an SVG document: every card, and what is in use of each mode."""
    blocks = [_block(node) for node in nodes]
    width = _page_width(blocks)
    kinds = list(_kinds(nodes, MARGIN, MARGIN + 136.0, width))
    top = MARGIN + 150.0 + 18 * _kind_rows(nodes, width)
    cells = _Cells()
    labels: list[str] = []
    x, y, deep = float(MARGIN), top, 0.0
    for block in blocks:
        if x > MARGIN and x + block.width > MARGIN + width:
            x, y, deep = float(MARGIN), y + deep + NODE_GAP, 0.0
        labels += _node(block, x, y, cells)
        x, deep = x + block.width + NODE_GAP, max(deep, block.height)
    return document(title, facts, [*kinds, *cells.paths(), *labels], 2 * MARGIN + width, y + deep + MARGIN)


class _Cells:
    """Rectangles by colour. Whole pixels where they can be: a path of thousands is read by people too."""

    def __init__(self) -> None:
        self._by_style: dict[str, list[str]] = {}

    def add(self, style: str, x: float, y: float, width: float, height: float) -> None:
        self._by_style.setdefault(style, []).append(f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z")

    def paths(self) -> Iterator[str]:
        for style, parts in self._by_style.items():
            yield f'<path {style} d="{"".join(parts)}"/>'


def _block(node: NodeBox) -> _Block:
    across = min(max(1, len(node.cards)), max(CARDS_PER_ROW, round(sqrt(2 * len(node.cards)))))
    rows = -(-len(node.cards) // across)
    tile = max((_tile_width(card) for card in node.cards), default=CELL)
    width = max(LEAST_NODE_WIDTH, across * (tile + TILE_GAP) - TILE_GAP)
    return _Block(node, across, width, NODE_HEAD + rows * (TILE_ROWS * CELL + TILE_GAP))


def _tile_width(card: CardBox) -> int:
    return CELL * max(2, -(-len(card.devices) // TILE_ROWS))


def _page_width(blocks: Sequence[_Block]) -> float:
    """Wide enough for the widest node, and for a page that is wider than high."""
    area = sum((block.width + NODE_GAP) * (block.height + NODE_GAP) for block in blocks)
    return max(720.0, sqrt(area * _ASPECT), max((block.width for block in blocks), default=0.0))


def _node(block: _Block, x: float, y: float, cells: _Cells) -> Iterator[str]:
    node = block.node
    modes = Counter(card.mode for card in node.cards)
    mode = next(iter(modes)) if len(modes) == 1 else "mixed"
    name = cut_name(node.name, block.width - len(mode) * 8 * 0.6 - 6, 9)
    yield f"<g><title>{escape(_tooltip(node, modes))}</title>"
    yield text(x, y + 8, name, 9, bold=True)
    yield text(x + block.width, y + 8, mode, 8, GREY, anchor="end")
    yield "</g>"
    tile = max((_tile_width(card) for card in node.cards), default=CELL)
    for place, card in enumerate(node.cards):
        row, column = divmod(place, block.across)
        _tile(card, x + column * (tile + TILE_GAP), y + NODE_HEAD + row * (TILE_ROWS * CELL + TILE_GAP), tile, cells)


def _tooltip(node: NodeBox, modes: Counter[str]) -> str:
    devices = [device for card in node.cards for device in card.devices]
    used = sum(bool(device.tenants) for device in devices)
    switched = sum(card.was is not None for card in node.cards)
    parts = [
        f"{node.name}: {node.note}",
        ", ".join(f"{count} cards {mode}" for mode, count in modes.items()),
        f"{used} of {len(devices)} devices in use",
        *([f"{switched} switched"] if switched else ()),
    ]
    return ", ".join(parts)


def _tile(card: CardBox, x: float, y: float, width: int, cells: _Cells) -> None:
    """Devices from top to bottom, then left to right; one of a whole card fills its tile."""
    height = TILE_ROWS * CELL
    frame = INK if card.was is not None else LINE
    cells.add(f'fill="{PAPER}" stroke="{frame}" stroke-width="1.2"', x - 1, y - 1, width + 2, height + 2)
    rows = min(TILE_ROWS, max(1, len(card.devices)))
    columns = max(1, -(-len(card.devices) // rows))
    for place, device in enumerate(card.devices):
        column, row = divmod(place, rows)
        _cell(device, x + column * width / columns, y + row * height / rows, width / columns, height / rows, cells)


def _cell(device: Device, x: float, y: float, width: float, height: float, cells: _Cells) -> None:
    """Tinted by the most urgent who stands there, and filled from the left as far as it is needed."""
    if not device.tenants:
        return
    priority = min((tenant.priority for tenant in device.tenants), key=PRIORITIES.index)
    needed = sum(tenant.need_gib for tenant in device.tenants) / device.memory_gib
    inner = width - 1
    cells.add(f'fill="{TINT[priority]}"', x, y, inner, height - 1)
    cells.add(f'fill="{STRONG[priority]}"', x, y, round(inner * min(1.0, max(0.0, needed)), 1), height - 1)


def _kinds(nodes: Sequence[NodeBox], x: float, y: float, width: float) -> Iterator[str]:
    """What is in use of each mode of each product, in as many columns as there is room for."""
    across = _kinds_across(width)
    for place, words in enumerate(_kind_lines(nodes)):
        row, column = divmod(place, across)
        yield text(x + column * width / across, y + 18 * row, words, 12)
    yield text(x, y - 18, "a tile is a card, with a dark rim where it is switched; a cell is a device", 12, GREY)


def _kinds_across(width: float) -> int:
    return max(1, int(width // 420))


def _kind_rows(nodes: Sequence[NodeBox], width: float) -> int:
    return -(-len(_kind_lines(nodes)) // _kinds_across(width))


def _kind_lines(nodes: Iterable[NodeBox]) -> list[str]:
    found: dict[str, list[int]] = {}
    for node in nodes:
        product = node.note.partition(" ")[0]
        for card in node.cards:
            counts = found.setdefault(f"{product} {card.mode}", [0, 0, 0])
            counts[0] += 1
            counts[1] += sum(bool(device.tenants) for device in card.devices)
            counts[2] += len(card.devices)
    lines = [
        f"{kind}: {cards} card{'s' if cards != 1 else ''}, {used} of {devices} devices in use"
        for kind, (cards, used, devices) in sorted(found.items())
    ]
    return (
        lines if len(lines) <= MOST_KINDS else [*lines[: MOST_KINDS - 1], f"{len(lines) - MOST_KINDS + 1} more kinds"]
    )
