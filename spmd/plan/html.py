"""A plan, or a search, as one HTML page: inline SVG, no script, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from spmd import tree
from spmd.plan import report
from spmd.plan.report import Plan
from spmd.plan.search import Candidate
from spmd.plan.targets import Target

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
WIDTH, BAR, LEFT = 860, 34, 150  # pixels
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } svg { width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: #222 }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.said { border-left: 4px solid #0072B2; padding: .3rem 0 .3rem .8rem } .bad { border-color: #D55E00 }
"""


def write(plan: Plan, place: str) -> None:
    """The page of a plan."""
    made = plan.estimate
    said = made.bottleneck if made else "Nothing is known of this target's speed."
    parts = [
        f'<p class="said{"" if plan.fits else " bad"}">{html.escape(plan.failed or said)}</p>',
        "<h2>Memory of a device</h2>",
        _memory(plan),
    ]
    if made is not None:
        times = {n: s for n, s in made.seconds.items() if n != "collectives"}
        times |= {n: shown for n, (_, shown) in made.networks.items()}
        parts += ["<h2>Time of a step (estimated)</h2>", _stack(times, report.seconds)]
    parts += ["<h2>Sent by a device in a step, by mesh axis</h2>", _axes(plan)]
    parts += ["<h2>In words</h2>", f"<pre>{html.escape(report.summary(plan))}</pre>"]
    if plan.compiled is not None:
        parts.append(f"<pre>{html.escape(report.comms_view(plan))}</pre>")
    _page(f"{plan.facts.name} on {plan.target.name}", parts, place)


def write_search(found: Sequence[Candidate], target: Target, name: str, place: str) -> None:
    """The page of a search."""
    parts = [
        "<h2>Every layout: memory and step time</h2>",
        _scatter(found),
        "<h2>In words</h2>",
        f"<pre>{html.escape(report.search_view(found, target))}</pre>",
    ]
    _page(f"{name} on {target.name}: {len(found)} layouts", parts, place)


def _page(title: str, parts: Sequence[str], place: str) -> None:
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{title}</h1>", *parts])
    page = f'<html lang="en"><head>{head}</head>\n<body>{body}\n</body></html>'
    Path(place).write_text(f"<!doctype html>\n{page}\n")


# ---- pictures


def _svg(height: float, shapes: Sequence[str], label: str) -> str:
    inner = "\n".join(shapes)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label)}">'
        f"\n{inner}\n</svg>"
    )


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{colour}">'
        f"<title>{html.escape(title)}</title></rect>"
    )


def _words(x: float, y: float, said: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(said)}</text>'


def _stack(parts: dict[str, float], shown, limit: float = 0.0, limit_name: str = "") -> str:
    """One bar of parts, a legend below; limit: a line across the bar."""
    parts = {name: size for name, size in parts.items() if size > 0}
    most = max(sum(parts.values()), limit) or 1.0
    scale, x, shapes = (WIDTH - 2) / most, 1.0, []
    for i, (name, size) in enumerate(parts.items()):
        colour = COLOURS[i % len(COLOURS)]
        shapes.append(_rect(x, 22, size * scale, BAR, colour, f"{name}: {shown(size)}"))
        x += size * scale
    if limit:
        at = 1 + limit * scale
        shapes.append(f'<path d="M{at - 1:.1f} 16V{26 + BAR}" stroke="#D55E00" stroke-width="2"/>')
        shapes.append(_words(at - 4, 14, f"{limit_name}: {shown(limit)}", "end"))
    y = 22 + BAR + 22
    for i, (name, size) in enumerate(parts.items()):
        shapes.append(_rect(1, y - 11, 12, 12, COLOURS[i % len(COLOURS)], name))
        shapes.append(_words(20, y, f"{name}: {shown(size)}"))
        y += 19
    return _svg(y, shapes, "parts of a whole")


def _memory(plan: Plan) -> str:
    parts = {name.replace("_", " "): float(n) for name, n in plan.memory._asdict().items()}
    chip = plan.target.chip
    limit = (chip.memory, f"a {chip.name}") if chip else (0.0, "")
    drawn = _stack(parts, tree.human_bytes, *limit)
    made = plan.compiled
    if made is None or made.how != "compiled":
        return f"<p>Estimated: {tree.human_bytes(plan.memory.peak)} at the peak.</p>{drawn}"
    peak = tree.human_bytes(made.memory.peak)
    said = f"{tree.human_bytes(plan.memory.peak)} at the peak by estimate, {peak} by the compiler."
    return f"<p>{said}</p>{drawn}"


def _axes(plan: Plan) -> str:
    """A bar for each axis, by kind of collective: of the compiled program where there is one."""
    sums: dict[str, dict[str, float]] = {}
    for (axes, kind), total in report.sent(plan).items():
        sums.setdefault(" x ".join(axes) or "?", {})[kind] = total.wire_bytes
    if not sums:
        return "<p>Nothing.</p>"
    kinds = sorted({kind for row in sums.values() for kind in row})
    most = max(sum(row.values()) for row in sums.values()) or 1.0
    scale, y, shapes = (WIDTH - LEFT - 110) / most, 8.0, []
    for axes, row in sums.items():
        shapes.append(_words(LEFT - 8, y + 16, axes, "end"))
        x = float(LEFT)
        for kind, size in row.items():
            colour = COLOURS[kinds.index(kind) % len(COLOURS)]
            said = f"{kind} over {axes}: {tree.human_bytes(size)}"
            shapes.append(_rect(x, y, size * scale, 24, colour, said))
            x += size * scale
        shapes.append(_words(x + 6, y + 16, tree.human_bytes(sum(row.values()))))
        y += 32
    x = float(LEFT)
    for i, kind in enumerate(kinds):
        shapes += [_rect(x, y + 4, 12, 12, COLOURS[i], kind), _words(x + 18, y + 15, kind)]
        x += 30 + 7.5 * len(kind)
    return _svg(y + 26, shapes, "bytes by mesh axis")


def _scatter(found: Sequence[Candidate]) -> str:
    """Memory across, step time up, both logarithmic; what does not fit is grey."""
    points = [(c, c.estimate) for c in found if c.estimate is not None]
    if not points:
        return "<p>No layout can be estimated.</p>"
    height, right, top = 420.0, WIDTH - 20.0, 20.0
    across = [math.log10(made.memory.peak) for _, made in points]
    up = [math.log10(made.step_seconds) for _, made in points]

    def place(value: float, values: Sequence[float], low: float, high: float) -> float:
        span = max(values) - min(values)
        return low + (value - min(values)) / span * (high - low) if span else (low + high) / 2

    axes = f"M{LEFT} {top}V{height}H{right}"
    shapes = [f'<path d="{axes}" fill="none" stroke="#222"/>']
    limit = math.log10(points[0][1].capacity)
    if min(across) < limit < max(across):
        x = place(limit, across, LEFT + 10, right - 10)
        shapes.append(
            f'<path d="M{x:.1f} {top}V{height}" stroke="#D55E00" stroke-dasharray="5 4"/>'
        )
        shapes.append(_words(x - 4, top + 8, "a device's memory", "end"))
    for (candidate, made), a, b in reversed(list(zip(points, across, up, strict=True))):
        x, y = place(a, across, LEFT + 10, right - 10), place(b, up, height - 10, top + 10)
        best = candidate is found[0] and candidate.fits
        colour = COLOURS[5] if best else COLOURS[0] if candidate.fits else "#cccccc"
        sizes = f"{report.seconds(made.step_seconds)}, {tree.human_bytes(made.memory.peak)}"
        said = html.escape(f"{candidate.layout}: {sizes}")
        shapes.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if best else 3}" fill="{colour}"'
            f' fill-opacity=".8"><title>{said}</title></circle>'
        )
    ends = [(min, "start", LEFT + 10.0), (max, "end", right - 10)]
    for pick, anchor, x in ends:
        shapes.append(_words(x, height + 18, tree.human_bytes(10 ** pick(across)), anchor))
    for pick, y in ((min, height - 10), (max, top + 14)):
        shapes.append(_words(LEFT - 8, y, report.seconds(10 ** pick(up)), "end"))
    shapes.append(_words((LEFT + right) / 2, height + 18, "memory of a device (log)", "middle"))
    shapes.append(_words(LEFT - 8, (top + height) / 2, "step time (log)", "end"))
    shapes.append(
        _words(LEFT, height + 40, "blue fits, grey does not, red is the fastest that fits")
    )
    return _svg(height + 50, shapes, "memory and step time of every layout")
