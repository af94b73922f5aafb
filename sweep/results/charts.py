"""Charts as SVG, drawn by Vega-Lite while the page is made. The only module that knows vl_convert.

No script is needed to show them, so they print, open offline and cost the reader no time. Colours are CSS variables of
the page, which knows light from dark; the texts in them are escaped by Vega.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

VEGA_LITE = "5.20"
"""The language's version that the specifications here are written in; vl_convert brings several."""

WIDTH = 180
"""Of a plot without its labels: with them it is as wide as a phone, so text keeps its size there."""

_INK, _MUTED, _LINE, _ACCENT, _GREY, _FILL = (
    f"var(--{name})" for name in ("ink", "muted", "line", "accent", "grey", "fill")
)

_CONFIG = {
    "aria": False,  # the page describes each chart in a sentence and has the numbers in a table
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _MUTED,
        "titleColor": _MUTED,
        "titleFontWeight": "normal",
        "gridColor": _LINE,
        "domain": False,
        "tickColor": _LINE,
        "labelFontSize": 11,
        "titleFontSize": 11,
    },
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model's number in a chart."""

    model: str
    value: float
    low: float
    """Ends of its 95 % interval; the value itself where there is none."""
    high: float
    published: float | None = None
    comparable: bool = False
    """Whether the published number was measured with the same settings."""
    billions: float | None = None
    """Parameters, where they are known."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A server's life or a cell on the timeline. Times are seconds since the sweep began."""

    row: int
    lane: int
    """Of `lanes`, from the top: cells that run at the same time on one server."""
    lanes: int
    kind: str
    """`starting` or `ready` of a server; `waiting` (for its server) or `cell` (at work) of a cell."""
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Label:
    """A server's name on the timeline, and the server's life there; seconds, as of a bar."""

    row: int
    text: str
    start: float
    end: float


def task_chart(points: Sequence[Point], metric: str) -> str:
    """Values with 95 % intervals, a line a model in the order given, and what was published."""
    rows = [
        {
            "model": point.model,
            "value": point.value,
            "text": f"{point.value:.4f}",
            "low": point.low,
            "high": point.high,
            **({} if point.published is None else {"same" if point.comparable else "other": point.published}),
        }
        for point in points
    ]
    x = {"type": "quantitative", "scale": {"zero": False, "nice": True}, "axis": {"title": metric, "tickCount": 4}}
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "rule", "color": _ACCENT, "strokeWidth": 2, "opacity": 0.55},
            "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 46, "color": _ACCENT, "opacity": 1},
            "encoding": {"x": {"field": "value", **x}},
        },
        {
            "mark": {"type": "text", "align": "left", "color": _INK, "fontSize": 11},
            "encoding": {"x": {"value": WIDTH + 14}, "text": {"field": "text"}},
        },
    ]
    for name, colour in (("same", _INK), ("other", _GREY)):
        if any(name in row for row in rows):
            mark = {"type": "point", "shape": "diamond", "size": 70, "color": colour, "strokeWidth": 1.6, "opacity": 1}
            layers.append(
                {
                    "mark": mark,
                    "transform": [{"filter": f"isValid(datum.{name})"}],
                    "encoding": {"x": {"field": name, **x}},
                }
            )
    y = {
        "field": "model",
        "type": "nominal",
        "sort": None,
        "axis": {"title": None, "labelColor": _INK, "labelLimit": 105, "ticks": False, "labelPadding": 6},
    }
    return _svg(
        {"data": {"values": rows}, "width": WIDTH, "height": {"step": 18}, "encoding": {"y": y}, "layer": layers}
    )


def size_chart(points: Sequence[Point], metric: str, *, higher_is_better: bool) -> str:
    """Parameters against value; labelled are models that are clearly above all smaller ones."""
    unit, per = ("millions", 1000) if max(point.billions or 0 for point in points) < 1 else ("billions", 1)
    known = sorted((p for p in points if p.billions is not None), key=lambda p: (p.billions or 0, -p.value))
    rows = []
    best: float | None = None
    apart = 0.07 * (max(point.value for point in known) - min(point.value for point in known))  # or labels overlap
    for point in known:
        leads = best is None or (point.value > best + apart if higher_is_better else point.value < best - apart)
        best = point.value if leads else best
        rows.append(
            {
                "parameters": (point.billions or 0) * per,
                "value": point.value,
                "low": point.low,
                "high": point.high,
                "label": point.model if leads else "",
            }
        )
    sizes = [(point.billions or 0) * per for point in known]
    middle = (sizes[0] * sizes[-1]) ** 0.5
    x = {
        "field": "parameters",
        "type": "quantitative",
        "scale": {"type": "log", "nice": False, "domain": [sizes[0] / 1.3, sizes[-1] * 1.3]},
        "axis": {
            "title": f"parameters, {unit} (log scale)",
            "grid": False,
            "values": _ticks(sizes[0], sizes[-1]),
            "format": "~g",
        },
    }
    y = {"type": "quantitative", "scale": {"zero": False}, "axis": {"title": metric, "tickCount": 5}}
    label = {"type": "text", "fontSize": 10, "color": _INK, "dy": -9, "stroke": None}
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "rule", "color": _ACCENT, "opacity": 0.35},
            "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 40, "color": _ACCENT, "opacity": 0.9},
            "encoding": {"y": {"field": "value", **y}},
        },
    ]
    for align, test in (("left", "<"), ("right", ">=")):  # towards the middle, so that no label leaves the plot
        layers.append(
            {
                "mark": {**label, "align": align},
                "transform": [{"filter": f"datum.parameters {test} {middle!r}"}],
                "encoding": {"y": {"field": "value", **y}, "text": {"field": "label"}},
            }
        )
    return _svg({"data": {"values": rows}, "width": 280, "height": 190, "encoding": {"x": x}, "layer": layers})


def timeline_chart(bars: Sequence[Bar], labels: Sequence[Label], rows: Sequence[str], end_s: float) -> str:
    """Rows of servers, what they did over time, and the cells that ran on them, which are thin while they wait."""
    height, width = 34, 860
    unit, per = ("hours", 3600) if end_s > 7200 else ("minutes", 60) if end_s > 180 else ("seconds", 1)
    values = []
    for bar in bars:
        top = bar.row * height + 4.0
        low, high = top, top + 12
        if bar.kind in ("cell", "waiting"):
            each = 12 / bar.lanes
            low = top + 14 + bar.lane * each
            high = low + each - (0.6 if bar.lanes > 1 else 0)
        if bar.kind == "waiting":
            middle, half = (low + high) / 2, max(0.3 * (high - low), min(1.0, high - low)) / 2
            low, high = middle - half, middle + half
        values.append({"kind": bar.kind, "a": bar.start / per, "b": bar.end / per, "low": low, "high": high})
    names = [
        {"a": at / per, "low": row * height + 4.0, "text": text, "align": align}
        for row, at, text, align in _fitting(labels, end_s, width / end_s)
    ]
    x = {
        "field": "a",
        "type": "quantitative",
        "scale": {"domain": [0, end_s / per], "nice": False},
        "axis": {"title": unit, "grid": True, "tickCount": 10},
    }
    y = {
        "field": "low",
        "type": "quantitative",
        "scale": {"domain": [0, len(rows) * height], "reverse": True, "nice": False},
        "axis": None,
    }
    colour = {
        "field": "kind",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": ["starting", "ready", "waiting", "cell"], "range": [_GREY, _FILL, _GREY, _ACCENT]},
    }
    faint = {"condition": {"test": "datum.kind == 'starting'", "value": 0.6}, "value": 1}  # a name may stand on it
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "rect", "stroke": "var(--bg)"},
            "encoding": {
                "x": x,
                "x2": {"field": "b"},
                "y": y,
                "y2": {"field": "high"},
                "color": colour,
                "fillOpacity": faint,
                "strokeWidth": {"condition": {"test": "datum.kind == 'waiting'", "value": 0}, "value": 0.5},
            },
        },
        {
            "data": {"values": [{"y": number * height + 16, "label": label} for number, label in enumerate(rows)]},
            "mark": {"type": "text", "align": "right", "fontSize": 11, "color": _INK, "limit": 240},
            "encoding": {"x": {"value": -8}, "y": {**y, "field": "y"}, "text": {"field": "label"}},
        },
    ]
    for align, dx in (("left", 3), ("right", -3)):
        mark = {"type": "text", "baseline": "top", "dy": 2, "fontSize": 9, "color": _INK, "align": align, "dx": dx}
        if chosen := [name for name in names if name["align"] == align]:
            layers.append(
                {
                    "data": {"values": chosen},
                    "mark": mark,
                    "encoding": {"x": x, "y": y, "text": {"field": "text"}},
                }
            )
    return _svg({"data": {"values": values}, "width": width, "height": len(rows) * height, "layer": layers})


def _fitting(labels: Iterable[Label], end_s: float, pixels: float) -> Iterator[tuple[int, float, str, str]]:
    """Row, moment, text and alignment of each name that its row has room for; `pixels` is the width of a second.

    A name begins with its server and may run on until the next one begins, or else it ends with its server and begins
    in the time before. It is cut where neither is long enough.
    """
    character, shortest = 6.2, 3
    ordered = sorted(labels, key=lambda label: (label.row, label.start))
    row, taken = -1, 0.0
    for label, following in zip_longest(ordered, ordered[1:]):
        if label.row != row:
            row, taken = label.row, 0.0
        after = following.start if following is not None and following.row == row else end_s
        right, left = after - label.start, label.end - taken
        align = "right" if right * pixels < character * len(label.text) and left > right else "left"
        room = int((left if align == "right" else right) * pixels / character)
        text = label.text if len(label.text) <= room else f"{label.text[: room - 1]}…" if room >= shortest else ""
        if text:
            yield row, label.end if align == "right" else label.start, text, align
        taken = label.end if align == "right" else max(label.end, label.start + len(text) * character / pixels)


def _ticks(low: float, high: float) -> list[float]:
    """1, 3, 10, 30 … within the range and next to it."""
    every = [base * 10.0**power for power in range(-4, 5) for base in (1, 3)]
    return [tick for tick in every if low / 1.3 <= tick <= high * 1.3]


def _svg(specification: Mapping[str, Any]) -> str:
    import vl_convert  # an engine of 80 MB, which no command needs that makes no page

    whole = {
        "background": None,
        # Labels are measured in another font than a reader's system has, which may be a tenth wider.
        "padding": {"left": 22, "right": 4, "top": 4, "bottom": 4},
        "config": _CONFIG,
        **specification,
    }
    try:
        drawn: str = vl_convert.vegalite_to_svg(whole, vl_version=VEGA_LITE)
    except BaseException as error:
        # A panic of its Rust part is no Exception, and its type cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"vl_convert panicked: {error}") from error
    return re.sub(r"<[^<>]*>", _lean, drawn)


def _lean(tag: re.Match[str]) -> str:
    """Without what is decoration to Vega and bytes to the reader: a wide sweep has tens of thousands of such nodes."""
    without = re.sub(r' (?:role|aria-roledescription|aria-hidden|pointer-events|class|xmlns:xlink)="[^"]*"', "", tag[0])
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", without)
