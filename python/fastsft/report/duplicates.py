"""What deduplication found, as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from fastsft.report import plots

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Duplicates</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1f2933; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: left; vertical-align: top; }
tr:nth-child(even) { background: #f4f6f8; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: .2rem 0; font-size: 13px; white-space: pre-wrap; } .note { color: #52606d; }
svg { max-width: 620px; height: auto; }
</style></head><body>
<h1>Duplicates</h1>
<p>{{ kept }} of {{ records }} records kept: {{ exact_duplicates }} exact and {{ near_duplicates }} near duplicates.</p>
{% for reason, count in skipped.items() %}
<p class="note">left out: {{ count }} x {{ reason }}, e.g. {{ skipped_examples[reason][0] }}</p>
{% endfor %}
{% if figure %}{{ figure | safe }}{% else %}
<p class="note">The plot needs matplotlib: pip install "fastsft[report]".</p>{% endif %}
<table><tr><th>members of the cluster</th><th>clusters</th></tr>
{% for name, count in sizes %}<tr><td class="n">{{ name }}</td><td class="n">{{ count }}</td></tr>{% endfor %}</table>
<h2>Largest clusters</h2>
<table><tr><th>size</th><th>members</th><th>begins with</th></tr>
{% for c in clusters %}<tr><td class="n">{{ c.size }}</td>
<td>{% for source in c.sources %}{{ source }}<br>{% endfor %}{% if c.size > c.sources | length %}...{% endif %}</td>
<td><pre>{{ c.example }}</pre></td></tr>{% endfor %}</table>
</body></html>
"""


def duplicates_page(summary: dict[str, Any]) -> str:
    """The page for what ``DedupReport.to_dict()`` gives; all text is escaped, nothing is loaded from elsewhere."""
    import jinja2

    sizes = _binned({int(size): count for size, count in summary["cluster_sizes"].items()})
    figure = None
    if plots.available():
        figure = plots.histogram("clusters by size", "members of the cluster (smallest of the bin)", sizes)
    named = [(str(low) if low < 4 else f"{low} to {2 * low - 1}", count) for low, count in sorted(sizes.items())]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = {"skipped": {}, "skipped_examples": {}, **summary}
    return environment.from_string(_PAGE).render(**{**page, "sizes": named, "figure": figure})


def _binned(sizes: dict[int, int]) -> dict[int, int]:
    """Counts by 1, 2, 3 and then by powers of two: the least of each bin and its clusters."""
    bins: dict[int, int] = {}
    for size, count in sizes.items():
        low = size if size < 4 else 1 << (size.bit_length() - 1)
        bins[low] = bins.get(low, 0) + count
    return bins
