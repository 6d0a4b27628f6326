"""A picture of a fleet: cards as boxes, partitions inside at their true size, who is on each and how full it is.

Plain SVG without scripts, styles from elsewhere or fonts of its own; it prints in grey too, since every priority also
carries its letter and every bar its figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, sqrt
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape as escape_markup
from xml.sax.saxutils import quoteattr

Priority = Literal["high", "medium", "low"]

PRIORITIES: tuple[Priority, ...] = ("high", "medium", "low")
# After Okabe and Ito: told apart by people with any colour vision, and darker the higher the priority in grey print.
STRONG: dict[Priority, str] = {"high": "#8f2d0c", "medium": "#0072b2", "low": "#3aa888"}
TINT: dict[Priority, str] = {"high": "#fbe6da", "medium": "#e0eef8", "low": "#e3f4ee"}
INK, GREY, LINE, PAPER = "#1c2733", "#5b6773", "#b9c2cb", "#ffffff"

MARGIN = 24
CARD_WIDTH = 344
CARD_GAP = 16
CARDS_PER_ROW = 4
CARD_HEAD = 40
CARD_BODY = 312
NODE_HEAD = 34
# Average width of a character of the sans-serif fonts, as a share of the font's size.
_GLYPH = 0.56
_BOLD = 1.12


class Tenant(NamedTuple):
    """Who holds a device. need_gib: weights, overhead and cache; budget_gib: what it may take; share_gib: its part
    of a device it shares, None where the device is its own.
    """

    name: str
    details: tuple[str, ...]
    priority: Priority
    need_gib: float
    budget_gib: float
    share_gib: float | None = None


class Device(NamedTuple):
    """A partition, or a whole card. memory_gib: what it reports; shareable_gib: what its tenants may take together."""

    number: int
    memory_gib: float
    tenants: tuple[Tenant, ...] = ()
    shareable_gib: float = 0.0


class CardBox(NamedTuple):
    """One card. was: its mode before the plan, None where it stays as it is."""

    number: int
    mode: str
    devices: tuple[Device, ...]
    was: str | None = None


class NodeBox(NamedTuple):
    """One node and its cards. note: stands beside the name."""

    name: str
    note: str
    cards: tuple[CardBox, ...]


class Box(NamedTuple):
    """A rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float


def picture(title: str, facts: str, nodes: Sequence[NodeBox]) -> str:
    """The fleet as an SVG document, every card with all that stands on it."""
    across = cards_across(sum(len(node.cards) for node in nodes))
    rows = list(_rows(nodes, across))
    columns = max(2, max((sum(_columns(node, across) for node in row) for row in rows), default=0))
    y = MARGIN + 122.0
    parts: list[str] = []
    for row in rows:
        x = float(MARGIN)
        for node in row:
            parts += _node(node, x, y, _columns(node, across))
            x += _columns(node, across) * (CARD_WIDTH + CARD_GAP)
        deep = max(-(-len(node.cards) // _columns(node, across)) for node in row)
        y += NODE_HEAD + deep * (CARD_HEAD + CARD_BODY + CARD_GAP) + 10
    width = 2 * MARGIN + columns * (CARD_WIDTH + CARD_GAP) - CARD_GAP
    return document(title, facts, parts, width, y + MARGIN / 2)


def document(title: str, facts: str, parts: Iterable[str], width: float, height: float) -> str:
    """An SVG document of `parts` below a title, a line of facts and the legend, which take 122 pixels."""
    return page(title, facts, [*_legend(MARGIN, MARGIN + 60.0), *parts], width, height)


def page(title: str, facts: str, parts: Iterable[str], width: float, height: float) -> str:
    """The same without a legend: title and facts take 60 pixels."""
    y = MARGIN + 26.0
    head = [text(MARGIN, y, title, 20, bold=True), text(MARGIN, y + 22, facts, 12, GREY)]
    body = "\n".join((*head, *parts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">\n'
        f"<title>{escape(title)}</title>\n{_hatch()}\n"
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def cards_across(cards: int) -> int:
    """Cards side by side, a multiple of four, so that the page is wider than high however many there are."""
    wanted = sqrt(1.6 * cards * (CARD_HEAD + CARD_BODY) / CARD_WIDTH)
    return CARDS_PER_ROW * max(1, ceil(wanted / CARDS_PER_ROW))


def escape(text: str) -> str:
    """Text for XML, which has no place for control characters."""
    return escape_markup("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))


def _columns(node: NodeBox, across: int) -> int:
    """Cards of one node side by side: four, more where it has many."""
    return max(1, min(len(node.cards), across, cards_across(len(node.cards))))


def _rows(nodes: Sequence[NodeBox], across: int) -> Iterator[list[NodeBox]]:
    """Nodes side by side as long as they fit into the width of the page."""
    row: list[NodeBox] = []
    for node in nodes:
        if row and sum(_columns(other, across) for other in row) + _columns(node, across) > across:
            yield row
            row = []
        row.append(node)
    if row:
        yield row


def _legend(x: float, y: float) -> Iterator[str]:
    at = x
    for priority in PRIORITIES:
        label = f"{priority} priority"
        yield _badge(at, y, priority)
        yield text(at + 22, y + 12, label, 12, GREY)
        at += 40 + len(label) * 12 * _GLYPH
    entries = (
        (f'fill="{GREY}"', "needed"),
        (f'fill="{PAPER}" stroke="{GREY}"', "headroom"),
        (f'fill="url(#reserve)" stroke="{LINE}"', "reserve the engine leaves alone; figures: need / budget of device"),
    )
    at = x
    for style, label in entries:
        yield f'<rect x="{at:.1f}" y="{y + 26:.1f}" width="22" height="9" rx="2" {style}/>'
        yield text(at + 28, y + 35, label, 12, GREY)
        at += 46 + len(label) * 12 * _GLYPH


def _node(node: NodeBox, x: float, y: float, columns: int) -> Iterator[str]:
    name = cut_name(node.name, columns * CARD_WIDTH * 0.55, 15)
    yield text(x, y + 18, name, 15, bold=True)
    yield text(x + len(name) * 15 * 0.68 + 14, y + 18, node.note, 12, GREY)
    for place, card in enumerate(node.cards):
        row, column = divmod(place, columns)
        left = x + column * (CARD_WIDTH + CARD_GAP)
        yield from _card(card, left, y + NODE_HEAD + row * (CARD_HEAD + CARD_BODY + CARD_GAP))


def _card(card: CardBox, x: float, y: float) -> Iterator[str]:
    yield (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{CARD_WIDTH}" height="{CARD_HEAD + CARD_BODY}" rx="8" '
        f'fill="#f4f6f8" stroke="{LINE}"/>'
    )
    yield text(x + 12, y + 17, f"card {card.number}", 13, bold=True)
    yield text(x + CARD_WIDTH - 12, y + 17, card.mode, 13, anchor="end")
    if card.was is not None:
        yield text(x + CARD_WIDTH - 12, y + 32, f"switched from {card.was}", 10, GREY, anchor="end")
    count = len(card.devices)
    yield text(x + 12, y + 32, f"{count} device{'s' if count != 1 else ''}", 10, GREY)
    height = (CARD_BODY - 8) / max(1, count)
    for place, device in enumerate(card.devices):
        box = Box(x + 8, y + CARD_HEAD + place * height, CARD_WIDTH - 16, height - 4)
        yield from _device(device, box)


def _device(device: Device, box: Box) -> Iterator[str]:
    alone = len(device.tenants) == 1 and device.tenants[0].share_gib is None
    if alone:
        yield from _alone(device.tenants[0], device, box)
        return
    yield rect(box, f'fill="{PAPER}" stroke="{LINE}" stroke-dasharray="4 3"')
    if device.tenants:
        yield text(box.x + 5, _middle(box), f"{device.number}", 11, GREY)
        yield from _shared(device, Box(box.x + 20, box.y, box.width - 20, box.height))
    else:
        yield text(box.x + 8, _middle(box), f"device {device.number}: free", 11, GREY)
        yield text(box.x + box.width - 8, _middle(box), _of(device.shareable_gib, device), 11, GREY, anchor="end")


def _of(gib: float, device: Device) -> str:
    """What may be taken of a device: an engine leaves a reserve alone."""
    return f"{gib:.1f} of {device.memory_gib:.1f} GiB" if gib else f"{device.memory_gib:.1f} GiB"


def _alone(tenant: Tenant, device: Device, box: Box) -> Iterator[str]:
    """Name and figures above, the bar below: the device's memory from left to right."""
    strong = STRONG[tenant.priority]
    yield "<g>"
    yield f"<title>{escape(_tooltip(tenant, device))}</title>"
    yield rect(box, f'fill="{TINT[tenant.priority]}" stroke="{strong}"')
    # Small devices hold one line of text and a bar; large ones keep both near their top.
    line = box.y + min(16.0, box.height * 0.45)
    yield _badge(box.x + 5, line - 11, tenant.priority, 13)
    yield text(box.x + 23, line, f"{device.number}", 11, GREY)
    figures = f"{tenant.need_gib:.1f} / {_of(tenant.budget_gib, device)}"
    yield text(box.x + box.width - 7, line, figures, 10, anchor="end")
    room = box.width - 50 - len(figures) * 10 * _GLYPH
    name = cut_name(tenant.name, room, 11)
    room -= len(name) * 11 * 0.66 + 6
    model = tenant.details[0].rpartition("/")[2] if box.height <= 60 and tenant.details and room > 30 else ""
    aside = f'<tspan dx="6" font-size="10" font-weight="normal" fill="{GREY}">{escape(cut(model, room, 10))}</tspan>'
    words = escape(name) + (aside if model else "")
    yield f'<text x="{box.x + 34:.1f}" y="{line:.1f}" font-size="11" font-weight="bold" fill="{INK}">{words}</text>'
    lines = tenant.details[: max(0, int((box.height - 46) // 16))]
    for place, detail in enumerate(lines, start=1):
        yield text(box.x + 23, line + 16 * place, cut(detail, box.width - 30, 11), 11, GREY)
    below = line + 16 * len(lines) + (10 if lines else 7)
    bar = Box(box.x + 7, below, box.width - 14, min(14.0, max(5.0, box.height * 0.18)))
    yield from _bar(tenant, device.memory_gib, bar, strong)
    yield "</g>"


def _shared(device: Device, box: Box) -> Iterator[str]:
    """Who shares a device, each as wide as its part of it, and what nobody holds."""
    left = box.x
    for tenant in device.tenants:
        width = box.width * min(1.0, (tenant.share_gib or tenant.budget_gib) / device.memory_gib)
        yield from _sharer(tenant, device, Box(left, box.y, max(0.0, width - 2), box.height))
        left += width
    left_gib = device.shareable_gib - sum(tenant.share_gib or 0.0 for tenant in device.tenants)
    words = f"{left_gib:.1f} GiB free"
    if left_gib > 0 and box.x + box.width - left > 16 + len(words) * 10 * _GLYPH:
        yield text(box.x + box.width - 8, _middle(box), words, 10, GREY, anchor="end")


def _sharer(tenant: Tenant, device: Device, box: Box) -> Iterator[str]:
    """As much as there is room for: priority, name, and below the bar need and limit."""
    strong = STRONG[tenant.priority]
    yield "<g>"
    yield f"<title>{escape(_tooltip(tenant, device))}</title>"
    yield rect(box, f'fill="{TINT[tenant.priority]}" stroke="{strong}"')
    line = box.y + min(16.0, box.height * 0.45)
    if box.width >= 20:
        yield _badge(box.x + 4, line - 11, tenant.priority, 12)
    if box.width >= 48:
        yield text(box.x + 19, line, cut_name(tenant.name, box.width - 22, 10.5), 9, bold=True)
    figures = f"{tenant.need_gib:.1f} / {tenant.budget_gib:.1f}"
    aside = len(figures) * 8 * _GLYPH + 4 if box.width >= 84 else 0.0
    bar = Box(box.x + 4, line + 7, max(0.0, box.width - 8 - aside), max(5.0, min(14.0, box.height * 0.18)))
    yield from _bar(tenant, tenant.budget_gib, bar, strong)
    if aside:
        yield text(box.x + box.width - 4, bar.y + 6.5, figures, 8, anchor="end")
    yield "</g>"


def _bar(tenant: Tenant, share_gib: float, box: Box, colour: str) -> Iterator[str]:
    def at(gib: float) -> float:
        return box.width * min(1.0, max(0.0, gib / share_gib)) if share_gib else 0.0

    yield rect(box, 'fill="url(#reserve)"', 2)
    yield rect(Box(box.x, box.y, at(tenant.budget_gib), box.height), f'fill="{PAPER}"', 2)
    yield rect(Box(box.x, box.y, at(tenant.need_gib), box.height), f'fill="{colour}"', 2)
    yield rect(box, f'fill="none" stroke="{colour}" stroke-width="0.8"', 2)


def _tooltip(tenant: Tenant, device: Device) -> str:
    return (
        f"{', '.join((tenant.name, *tenant.details))}, {tenant.priority} priority: needs {tenant.need_gib:.2f} of "
        f"{tenant.budget_gib:.2f} GiB on device {device.number} ({device.memory_gib:.2f} GiB)"
    )


def _badge(x: float, y: float, priority: Priority, size: float = 15) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{size}" height="{size}" rx="3" fill="{STRONG[priority]}"/>'
        f'<text x="{x + size / 2:.1f}" y="{y + size * 0.76:.1f}" font-size="{size * 0.72:.1f}" font-weight="bold" '
        f'text-anchor="middle" fill="{PAPER}">{priority[0].upper()}</text>'
    )


def rect(box: Box, style: str, radius: float = 4) -> str:
    """A rectangle in that style."""
    return (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{max(0.0, box.width):.1f}" '
        f'height="{max(0.0, box.height):.1f}" rx="{radius}" {style}/>'
    )


def text(
    x: float, y: float, words: str, size: float, fill: str = INK, *, bold: bool = False, anchor: str = "start"
) -> str:
    """A line of text, escaped. x: of its anchor; y: of its base line."""
    weight = ' font-weight="bold"' if bold else ""
    place = "" if anchor == "start" else f" text-anchor={quoteattr(anchor)}"
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{weight}{place}>{escape(words)}</text>'


def cut(words: str, width: float, size: float) -> str:
    """As much of the text as fits, by the fonts' average width; the whole stands in the tooltip."""
    room = _room(width, size)
    return words if len(words) <= room else words[: room - 1].rstrip() + "…"


def cut_name(name: str, width: float, size: float) -> str:
    """So of a name in bold. What tells names apart stands at their ends (`chat/3`, `gpu-017`): the middle goes."""
    room = _room(width, size * _BOLD)
    if len(name) <= room:
        return name
    tail = (room - 1) // 3
    return name[: room - 1 - tail] + "…" + name[len(name) - tail :]


def _room(width: float, size: float) -> int:
    return max(2, int(width / (size * (_GLYPH + 0.02))))


def _middle(box: Box) -> float:
    return box.y + box.height / 2 + 4


def _hatch() -> str:
    return (
        '<defs><pattern id="reserve" width="5" height="5" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="5" height="5" fill="#eef1f4"/>'
        f'<line x1="0" y1="0" x2="0" y2="5" stroke="{LINE}" stroke-width="2"/></pattern></defs>'
    )
