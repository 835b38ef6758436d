"""What decontamination found, as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from fastsft.report import plots
from fastsft.report.page import render

_BODY = """\
<p>{{ kept }} of {{ records }} records kept, {{ dropped | length }} dropped by {{ rules | join(", ") }}.</p>
{% for reason, count in skipped.items() %}
<p class="note">left out: {{ count }} x {{ reason }}, e.g. {{ skipped_examples[reason][0] }}</p>
{% endfor %}
{% if figure %}{{ figure | safe }}{% else %}
<p class="note">The plot needs matplotlib: pip install "fastsft[report]".</p>{% endif %}
<table><tr><th>evaluation file</th><th>rows</th><th>found</th><th>too short to be</th></tr>
{% for e in evaluation %}<tr><td>{{ e.file }}</td><td class="n">{{ e.rows }}</td><td class="n">{{ e.found }}</td>
<td class="n">{{ e.without_ngrams }}</td></tr>{% endfor %}</table>
<h2>Dropped rows, the largest shares first</h2>
{% if dropped | length > shown | length %}<p class="note">{{ shown | length }} of {{ dropped | length }}; a report with
a name in .json has all.</p>{% endif %}
<table><tr><th>row</th><th>evaluation</th><th>rule</th><th>covered</th><th>shared words</th></tr>
{% for d in shown %}<tr><td>{{ d.source }}</td><td>{{ d.evaluation }}</td><td>{{ d.rule }}</td>
<td class="n">{{ "%.0f" | format(100 * d.coverage) }} %</td><td><pre>{{ d.passage }}</pre></td></tr>{% endfor %}</table>
"""


def contamination_page(summary: dict[str, Any], limit: int = 500) -> str:
    """The page for what ``DecontaminationReport.to_dict()`` gives, with at most ``limit`` dropped rows; all text is
    escaped, nothing is loaded from elsewhere."""
    figure = None
    if plots.available():
        files = summary["evaluation"]
        names = [str(e["file"]).rpartition("/")[2] for e in files]
        shares = [100 * e["found"] / max(e["rows"], 1) for e in files]
        figure = plots.bars("evaluation rows found in the training data", "% of rows", names, shares, "{:.1f}")
    shown = sorted(summary["dropped"], key=lambda d: -d["coverage"])[:limit]
    page = {"skipped": {}, "skipped_examples": {}, **summary}
    return render("Evaluation data in training data", _BODY, {**page, "shown": shown, "figure": figure})
