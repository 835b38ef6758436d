"""Plots as SVG, so that a report is one file; their words are text that can be searched and read aloud.

Needs matplotlib (the ``report`` extra).
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

Series = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def available() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def lines(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """One curve per series; a series of few points is drawn with markers."""
    figure, axes = _axes(title, x_label, y_label)
    for label, x, y in series:
        axes.plot(x, y, label=label, marker="o" if len(x) < 12 else "", linewidth=1.4)
    axes.legend(frameon=False)
    ends = [f"{label} from {y[0]:.3g} to {y[-1]:.3g}" for label, _, y in series if y]
    return _svg(figure, f"{title}, {y_label} by {x_label}: {', '.join(ends)}")


def bars(title: str, y_label: str, names: Sequence[str], values: Sequence[float], form: str = "{:.2f}") -> str:
    """A bar for each name, with its value in ``form`` on top."""
    figure, axes = _axes(title, "", y_label)
    drawn = axes.bar(list(names), list(values), width=0.55, color="#2f6db3")
    labels = [form.format(v) for v in values]
    axes.bar_label(drawn, labels=labels, padding=2)
    axes.set_ylim(0, max([*values, 1e-9]) * 1.15)
    pairs = ", ".join(f"{name} {label}" for name, label in zip(names, labels, strict=True))
    return _svg(figure, f"{title}, {y_label}: {pairs}")


def histogram(title: str, x_label: str, counts: dict[int, int]) -> str:
    """Counts by integer key, on a logarithmic axis."""
    figure, axes = _axes(title, x_label, "clusters")
    keys = sorted(counts)
    axes.bar([str(k) for k in keys], [counts[k] for k in keys], color="#2f6db3")
    axes.set_yscale("log")
    pairs = ", ".join(f"{counts[k]} of {k}" for k in keys)
    return _svg(figure, f"{title}, by {x_label}: {pairs}")


def _axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, alt: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text, and is no outline
        # No metadata: it would bring links and the time.
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    label = html.escape(alt)
    return f'<svg role="img" aria-label="{label}"{text[text.index("<svg") + 4 :]}'
