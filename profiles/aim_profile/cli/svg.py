"""A picture of a fleet: cards as boxes, partitions inside at their true size, who is on each and how full it is.

Plain SVG without scripts, styles from elsewhere or fonts of its own; it prints in grey too, since every priority also
carries its letter and every bar its figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape as escape_markup
from xml.sax.saxutils import quoteattr

Priority = Literal["high", "medium", "low"]

PRIORITIES: tuple[Priority, ...] = ("high", "medium", "low")
# After Okabe and Ito: told apart by people with any colour vision, and darker the higher the priority in grey print.
_STRONG: dict[Priority, str] = {"high": "#8f2d0c", "medium": "#0072b2", "low": "#3aa888"}
_TINT: dict[Priority, str] = {"high": "#fbe6da", "medium": "#e0eef8", "low": "#e3f4ee"}
_INK, _GREY, _LINE, _PAPER = "#1c2733", "#5b6773", "#b9c2cb", "#ffffff"

MARGIN = 24
CARD_WIDTH = 320
CARD_GAP = 16
CARDS_PER_ROW = 4
CARD_HEAD = 40
CARD_BODY = 312
NODE_HEAD = 34
MOST_CARDS = 256
# Average width of a character of the sans-serif fonts, as a share of the font's size.
_GLYPH = 0.56


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
    """The fleet as an SVG document; beyond 256 cards only the first are drawn, and it says so."""
    drawn, left_out = _within(nodes, MOST_CARDS)
    rows = list(_rows(drawn))
    columns = max(2, max((sum(_columns(node) for node in row) for row in rows), default=0))
    width = 2 * MARGIN + columns * (CARD_WIDTH + CARD_GAP) - CARD_GAP
    y = MARGIN + 26.0
    parts = [_text(MARGIN, y, title, 20, bold=True), _text(MARGIN, y + 22, facts, 12, _GREY)]
    if left_out:
        parts.append(_text(MARGIN, y + 40, f"{left_out} more cards are not drawn", 12, _GREY))
        y += 18
    parts += _legend(MARGIN, y + 34)
    y += 96
    for row in rows:
        x = float(MARGIN)
        for node in row:
            parts += _node(node, x, y)
            x += _columns(node) * (CARD_WIDTH + CARD_GAP)
        deep = max(-(-len(node.cards) // CARDS_PER_ROW) for node in row)
        y += NODE_HEAD + deep * (CARD_HEAD + CARD_BODY + CARD_GAP) + 10
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + MARGIN / 2:.0f}" '
        f'viewBox="0 0 {width} {y + MARGIN / 2:.0f}" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">\n'
        f"<title>{escape(title)}</title>\n{_hatch()}\n"
        f'<rect width="100%" height="100%" fill="{_PAPER}"/>\n{body}\n</svg>\n'
    )


def escape(text: str) -> str:
    """Text for XML, which has no place for control characters."""
    return escape_markup("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text))


def _columns(node: NodeBox) -> int:
    return max(1, min(CARDS_PER_ROW, len(node.cards)))


def _rows(nodes: Sequence[NodeBox]) -> Iterator[list[NodeBox]]:
    """Nodes side by side as long as four cards stand in a row."""
    row: list[NodeBox] = []
    for node in nodes:
        if row and sum(map(_columns, row)) + _columns(node) > CARDS_PER_ROW:
            yield row
            row = []
        row.append(node)
    if row:
        yield row


def _within(nodes: Sequence[NodeBox], most: int) -> tuple[list[NodeBox], int]:
    kept: list[NodeBox] = []
    room = most
    for node in nodes:
        if room > 0:
            kept.append(node._replace(cards=node.cards[:room]))
        room -= len(node.cards)
    return kept, max(0, -room)


def _legend(x: float, y: float) -> Iterator[str]:
    at = x
    for priority in PRIORITIES:
        label = f"{priority} priority"
        yield _badge(at, y, priority)
        yield _text(at + 22, y + 12, label, 12, _GREY)
        at += 40 + len(label) * 12 * _GLYPH
    entries = (
        (f'fill="{_GREY}"', "needed"),
        (f'fill="{_PAPER}" stroke="{_GREY}"', "headroom"),
        (f'fill="url(#reserve)" stroke="{_LINE}"', "reserve the engine leaves alone"),
    )
    at = x
    for style, label in entries:
        yield f'<rect x="{at:.1f}" y="{y + 26:.1f}" width="22" height="9" rx="2" {style}/>'
        yield _text(at + 28, y + 35, label, 12, _GREY)
        at += 46 + len(label) * 12 * _GLYPH


def _node(node: NodeBox, x: float, y: float) -> Iterator[str]:
    name = _cut(node.name, _columns(node) * CARD_WIDTH * 0.6, 15)
    yield _text(x, y + 18, name, 15, bold=True)
    yield _text(x + len(name) * 15 * 0.62 + 14, y + 18, node.note, 12, _GREY)
    for place, card in enumerate(node.cards):
        row, column = divmod(place, CARDS_PER_ROW)
        left = x + column * (CARD_WIDTH + CARD_GAP)
        yield from _card(card, left, y + NODE_HEAD + row * (CARD_HEAD + CARD_BODY + CARD_GAP))


def _card(card: CardBox, x: float, y: float) -> Iterator[str]:
    yield (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{CARD_WIDTH}" height="{CARD_HEAD + CARD_BODY}" rx="8" '
        f'fill="#f4f6f8" stroke="{_LINE}"/>'
    )
    yield _text(x + 12, y + 17, f"card {card.number}", 13, bold=True)
    yield _text(x + CARD_WIDTH - 12, y + 17, card.mode, 13, anchor="end")
    if card.was is not None:
        yield _text(x + CARD_WIDTH - 12, y + 32, f"switched from {card.was}", 10, _GREY, anchor="end")
    count = len(card.devices)
    yield _text(x + 12, y + 32, f"{count} device{'s' if count != 1 else ''}", 10, _GREY)
    height = (CARD_BODY - 8) / max(1, count)
    for place, device in enumerate(card.devices):
        box = Box(x + 8, y + CARD_HEAD + place * height, CARD_WIDTH - 16, height - 4)
        yield from _device(device, box)


def _device(device: Device, box: Box) -> Iterator[str]:
    if not device.tenants:
        yield _rect(box, f'fill="{_PAPER}" stroke="{_LINE}" stroke-dasharray="4 3"')
        yield _text(box.x + 8, _middle(box), f"device {device.number}: free", 11, _GREY)
        yield _text(box.x + box.width - 8, _middle(box), f"{device.memory_gib:.1f} GiB", 11, _GREY, anchor="end")
        return
    alone = len(device.tenants) == 1 and device.tenants[0].share_gib is None
    if not alone:
        yield _rect(box, f'fill="{_PAPER}" stroke="{_LINE}" stroke-dasharray="4 3"')
    left = box.x
    for tenant in device.tenants:
        width = box.width * (1 if tenant.share_gib is None else min(1.0, tenant.share_gib / device.memory_gib))
        yield from _tenant(tenant, device, Box(left, box.y, width - (0 if alone else 2), box.height), alone)
        left += width
    if not alone:
        yield from _left_over(device, Box(left, box.y, box.x + box.width - left, box.height))


def _left_over(device: Device, box: Box) -> Iterator[str]:
    """What nobody holds of a shared device, where there is room to say so."""
    left_gib = device.shareable_gib - sum(tenant.share_gib or 0.0 for tenant in device.tenants)
    text = f"{left_gib:.1f} GiB free"
    if left_gib > 0 and box.width > 16 + len(text) * 10 * _GLYPH:
        yield _text(box.x + box.width - 8, _middle(box), text, 10, _GREY, anchor="end")


def _tenant(tenant: Tenant, device: Device, box: Box, alone: bool) -> Iterator[str]:
    """Name and figures above, the bar below: the device's memory from left to right."""
    strong = _STRONG[tenant.priority]
    share = device.memory_gib if alone else tenant.budget_gib
    yield "<g>"
    yield f"<title>{escape(_tooltip(tenant, device))}</title>"
    yield _rect(box, f'fill="{_TINT[tenant.priority]}" stroke="{strong}"')
    # Small devices hold one line of text and a bar; large ones keep both near their top.
    line = box.y + min(16.0, box.height * 0.45)
    yield _badge(box.x + 5, line - 11, tenant.priority, 13)
    figures = f"{tenant.need_gib:.1f} / {share:.1f} GiB" if alone else f"{share:.0f} GiB"
    room = box.width - 30 - len(figures) * 10 * _GLYPH
    if alone:
        yield _text(box.x + 23, line, f"{device.number}", 11, _GREY)
    left = box.x + (34 if alone else 20)
    name = _cut(tenant.name, room - (left - box.x - 23), 11 if alone else 9)
    room -= left - box.x - 17 + len(name) * 11 * 0.62
    model = tenant.details[0].rpartition("/")[2] if alone and box.height <= 60 and tenant.details else ""
    aside = f'<tspan dx="6" font-size="10" font-weight="normal" fill="{_GREY}">{escape(_cut(model, room, 10))}</tspan>'
    text = escape(name) + (aside if model and room > 40 else "")
    size = 11 if alone else 9
    yield f'<text x="{left:.1f}" y="{line:.1f}" font-size="{size}" font-weight="bold" fill="{_INK}">{text}</text>'
    yield _text(box.x + box.width - 7, line, figures, 10 if alone else 8, anchor="end")
    lines = tenant.details[: max(0, int((box.height - 46) // 16))] if alone else ()
    for place, detail in enumerate(lines, start=1):
        yield _text(box.x + 23, line + 16 * place, _cut(detail, box.width - 30, 11), 11, _GREY)
    below = line + 16 * len(lines) + (10 if lines else 7)
    bar = Box(box.x + 7, below, box.width - 14, min(14.0, max(5.0, box.height * 0.18)))
    yield from _bar(tenant, share, bar, strong)
    yield "</g>"


def _bar(tenant: Tenant, share_gib: float, box: Box, colour: str) -> Iterator[str]:
    def at(gib: float) -> float:
        return box.width * min(1.0, max(0.0, gib / share_gib)) if share_gib else 0.0

    yield _rect(box, 'fill="url(#reserve)"', 2)
    yield _rect(Box(box.x, box.y, at(tenant.budget_gib), box.height), f'fill="{_PAPER}"', 2)
    yield _rect(Box(box.x, box.y, at(tenant.need_gib), box.height), f'fill="{colour}"', 2)
    yield _rect(box, f'fill="none" stroke="{colour}" stroke-width="0.8"', 2)


def _tooltip(tenant: Tenant, device: Device) -> str:
    return (
        f"{', '.join((tenant.name, *tenant.details))}, {tenant.priority} priority: needs {tenant.need_gib:.2f} of "
        f"{tenant.budget_gib:.2f} GiB on device {device.number} ({device.memory_gib:.2f} GiB)"
    )


def _badge(x: float, y: float, priority: Priority, size: float = 15) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{size}" height="{size}" rx="3" fill="{_STRONG[priority]}"/>'
        f'<text x="{x + size / 2:.1f}" y="{y + size * 0.76:.1f}" font-size="{size * 0.72:.1f}" font-weight="bold" '
        f'text-anchor="middle" fill="{_PAPER}">{priority[0].upper()}</text>'
    )


def _rect(box: Box, style: str, radius: float = 4) -> str:
    return (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{max(0.0, box.width):.1f}" '
        f'height="{max(0.0, box.height):.1f}" rx="{radius}" {style}/>'
    )


def _text(
    x: float, y: float, text: str, size: float, fill: str = _INK, *, bold: bool = False, anchor: str = "start"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = "" if anchor == "start" else f" text-anchor={quoteattr(anchor)}"
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{weight}{place}>{escape(text)}</text>'


def _cut(text: str, width: float, size: float) -> str:
    """As much of the text as fits, by the fonts' average width; the whole stands in the tooltip."""
    room = int(width / (size * (_GLYPH + 0.02)))
    return text if len(text) <= room else text[: max(1, room - 1)].rstrip() + "…"


def _middle(box: Box) -> float:
    return box.y + box.height / 2 + 4


def _hatch() -> str:
    return (
        '<defs><pattern id="reserve" width="5" height="5" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="5" height="5" fill="#eef1f4"/>'
        f'<line x1="0" y1="0" x2="0" y2="5" stroke="{_LINE}" stroke-width="2"/></pattern></defs>'
    )
