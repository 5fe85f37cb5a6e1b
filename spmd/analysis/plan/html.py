"""A plan or a search as a self-contained HTML page: inline SVG, no script, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from spmd.analysis.plan import kernels, report
from spmd.analysis.plan.report import Plan
from spmd.analysis.plan.search import Candidate
from spmd.core import tree
from spmd.hardware.targets import Target

# The palette of Okabe and Ito, which is safe for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
WIDTH, BAR, LEFT = 860, 34, 150  # pixels
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } svg { width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: #222 }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.verdict { border-left: 4px solid #0072B2; padding: .3rem 0 .3rem .8rem } .bad { border-color: #D55E00 }
"""


def write(plan: Plan, file: str) -> None:
    """Writes the page of a plan."""
    estimate = plan.estimate
    verdict = estimate.bottleneck if estimate else "No speed is known for this target."
    parts = [
        f'<p class="verdict{"" if plan.fits else " bad"}">{html.escape(plan.failed or verdict)}</p>',
        "<h2>Memory of a device</h2>",
        _memory(plan),
    ]
    if estimate is not None:
        times = {n: s for n, s in estimate.seconds.items() if n != "collectives"}
        times |= {n: exposed for n, (_, exposed) in estimate.networks.items()}
        parts += ["<h2>Time of a step (estimated)</h2>", _stack(times, report.seconds)]
    parts += ["<h2>Sent by a device in a step, by mesh axis</h2>", _axes(plan)]
    parts += ["<h2>In words</h2>", f"<pre>{html.escape(report.summary(plan))}</pre>"]
    if plan.compiled is not None:
        parts.append(f"<pre>{html.escape(report.comms_view(plan))}</pre>")
    if plan.compiled is not None and plan.compiled.program.cycles:
        parts += [
            "<h2>Kernels, by the compiler's cycles</h2>",
            f"<pre>{html.escape(kernels.kernels_view(plan))}</pre>",
        ]
    _page(f"{plan.facts.name} on {plan.target.name}", parts, file)


def write_search(candidates: Sequence[Candidate], target: Target, name: str, file: str) -> None:
    """Writes the page of a search."""
    parts = [
        "<h2>Every layout: memory and step time</h2>",
        _scatter(candidates),
        "<h2>In words</h2>",
        f"<pre>{html.escape(report.search_view(candidates, target))}</pre>",
    ]
    _page(f"{name} on {target.name}: {len(candidates)} layouts", parts, file)


def _page(title: str, parts: Sequence[str], file: str) -> None:
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{title}</h1>", *parts])
    page = f'<html lang="en"><head>{head}</head>\n<body>{body}\n</body></html>'
    Path(file).write_text(f"<!doctype html>\n{page}\n")


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


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _stack(
    parts: dict[str, float],
    label: Callable[[float], str],
    limit: float = 0.0,
    limit_name: str = "",
) -> str:
    """A bar made of parts, with a legend below. label: formats a size. limit: a line across the bar."""
    parts = {name: size for name, size in parts.items() if size > 0}
    most = max(sum(parts.values()), limit) or 1.0
    scale, x, shapes = (WIDTH - 2) / most, 1.0, []
    for i, (name, size) in enumerate(parts.items()):
        colour = COLOURS[i % len(COLOURS)]
        shapes.append(_rect(x, 22, size * scale, BAR, colour, f"{name}: {label(size)}"))
        x += size * scale
    if limit:
        position = 1 + limit * scale
        shapes.append(
            f'<path d="M{position - 1:.1f} 16V{26 + BAR}" stroke="#D55E00" stroke-width="2"/>'
        )
        shapes.append(_text(position - 4, 14, f"{limit_name}: {label(limit)}", "end"))
    y = 22 + BAR + 22
    for i, (name, size) in enumerate(parts.items()):
        shapes.append(_rect(1, y - 11, 12, 12, COLOURS[i % len(COLOURS)], name))
        shapes.append(_text(20, y, f"{name}: {label(size)}"))
        y += 19
    return _svg(y, shapes, "parts of the total")


def _memory(plan: Plan) -> str:
    parts = {name.replace("_", " "): float(n) for name, n in plan.memory._asdict().items()}
    chip = plan.target.chip
    limit = (chip.memory, f"a {chip.name}") if chip else (0.0, "")
    picture = _stack(parts, tree.human_bytes, *limit)
    estimated, compiled = tree.human_bytes(plan.memory.peak), plan.compiled
    if compiled is None or compiled.how != "compiled":
        return f"<p>Estimated peak: {estimated}.</p>{picture}"
    peak = tree.human_bytes(compiled.memory.peak)
    return f"<p>Peak: {estimated} estimated, {peak} by the compiler.</p>{picture}"


def _axes(plan: Plan) -> str:
    """A bar per mesh axis, by kind of collective; of the compiled program if there is one."""
    sums: dict[str, dict[str, float]] = {}
    for (axes, kind), total in report.sent(plan).items():
        sums.setdefault(" x ".join(axes) or "?", {})[kind] = total.wire_bytes
    if not sums:
        return "<p>No collectives.</p>"
    kinds = sorted({kind for row in sums.values() for kind in row})
    most = max(sum(row.values()) for row in sums.values()) or 1.0
    scale, y, shapes = (WIDTH - LEFT - 110) / most, 8.0, []
    for axes, row in sums.items():
        shapes.append(_text(LEFT - 8, y + 16, axes, "end"))
        x = float(LEFT)
        for kind, size in row.items():
            colour = COLOURS[kinds.index(kind) % len(COLOURS)]
            title = f"{kind} over {axes}: {tree.human_bytes(size)}"
            shapes.append(_rect(x, y, size * scale, 24, colour, title))
            x += size * scale
        shapes.append(_text(x + 6, y + 16, tree.human_bytes(sum(row.values()))))
        y += 32
    x = float(LEFT)
    for i, kind in enumerate(kinds):
        shapes += [_rect(x, y + 4, 12, 12, COLOURS[i], kind), _text(x + 18, y + 15, kind)]
        x += 30 + 7.5 * len(kind)
    return _svg(y + 26, shapes, "bytes by mesh axis")


def _scatter(candidates: Sequence[Candidate]) -> str:
    """Memory on the x axis, step time on the y axis, both logarithmic; layouts that do not fit are grey."""
    points = [(c, c.estimate) for c in candidates if c.estimate is not None]
    if not points:
        return "<p>No layout can be estimated.</p>"
    height, right, top = 420.0, WIDTH - 20.0, 20.0
    across = [math.log10(candidate.peak) for candidate, _ in points]
    up = [math.log10(estimate.step_seconds) for _, estimate in points]

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
        shapes.append(_text(x - 4, top + 8, "a device's memory", "end"))
    for (candidate, estimate), a, b in reversed(list(zip(points, across, up, strict=True))):
        x, y = place(a, across, LEFT + 10, right - 10), place(b, up, height - 10, top + 10)
        best = candidate is candidates[0] and candidate.fits
        colour = COLOURS[5] if best else COLOURS[0] if candidate.fits else "#cccccc"
        sizes = f"{report.seconds(estimate.step_seconds)}, {tree.human_bytes(candidate.peak)}"
        title = html.escape(f"{candidate.layout}: {sizes}")
        shapes.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if best else 3}" fill="{colour}"'
            f' fill-opacity=".8"><title>{title}</title></circle>'
        )
    ends = [(min, "start", LEFT + 10.0), (max, "end", right - 10)]
    for pick, anchor, x in ends:
        shapes.append(_text(x, height + 18, tree.human_bytes(10 ** pick(across)), anchor))
    for pick, y in ((min, height - 10), (max, top + 14)):
        shapes.append(_text(LEFT - 8, y, report.seconds(10 ** pick(up)), "end"))
    shapes.append(_text((LEFT + right) / 2, height + 18, "memory of a device (log)", "middle"))
    shapes.append(_text(LEFT - 8, (top + height) / 2, "step time (log)", "end"))
    shapes.append(
        _text(LEFT, height + 40, "blue fits, grey does not, red is the fastest that fits")
    )
    return _svg(height + 50, shapes, "memory and step time of every layout")
