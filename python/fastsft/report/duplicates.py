"""What deduplication found, as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from fastsft.report import plots
from fastsft.report.page import render

_BODY = """\
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
"""


def duplicates_page(summary: dict[str, Any]) -> str:
    """The page for what ``DedupReport.to_dict()`` gives; all text is escaped, nothing is loaded from elsewhere."""
    sizes = _binned({int(size): count for size, count in summary["cluster_sizes"].items()})
    figure = None
    if plots.available():
        figure = plots.histogram("clusters by size", "members of the cluster (smallest of the bin)", sizes)
    named = [(str(low) if low < 4 else f"{low} to {2 * low - 1}", count) for low, count in sorted(sizes.items())]
    page = {"skipped": {}, "skipped_examples": {}, **summary}
    return render("Duplicates", _BODY, {**page, "sizes": named, "figure": figure})


def _binned(sizes: dict[int, int]) -> dict[int, int]:
    """Counts by 1, 2, 3 and then by powers of two: the least of each bin and its clusters."""
    bins: dict[int, int] = {}
    for size, count in sizes.items():
        low = size if size < 4 else 1 << (size.bit_length() - 1)
        bins[low] = bins.get(low, 0) + count
    return bins
