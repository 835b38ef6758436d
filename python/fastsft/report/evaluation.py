"""pass@k and how the samples failed, as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from fastsft.report.page import render

_BODY = """\
<p>{{ passed }} of {{ samples }} samples of {{ tasks | length }} tasks passed.</p>
<table><tr>{% for k in pass_at %}<th>pass@{{ k }}</th>{% endfor %}</tr>
<tr>{% for value in pass_at.values() %}<td class="n">{{ "%.3f" | format(value) }}</td>{% endfor %}</tr></table>
<h2>Failures</h2>
{% if failures %}<table><tr><th>kind</th><th>samples</th><th>share</th></tr>
{% for kind, count in failures.items() %}<tr><td>{{ kind }}</td><td class="n">{{ count }}</td>
<td class="n">{{ "%.1f" | format(100 * count / samples) }} %</td></tr>{% endfor %}</table>
{% else %}<p>none</p>{% endif %}
<h2>Tasks</h2>
<table><tr><th>task</th><th>passed</th><th>failures</th><th>the first</th></tr>
{% for t in tasks %}<tr><td>{{ t.task_id }}</td><td class="n">{{ t.passed }} of {{ t.samples }}</td>
<td>{% for kind, count in t.failures.items() %}{{ kind }}: {{ count }}<br>{% endfor %}</td>
<td><pre>{{ t.failure or "" }}</pre></td></tr>{% endfor %}</table>
<h2>Settings</h2>
<table>{% for name, value in settings.items() %}<tr><th>{{ name }}</th>
<td>{{ value | join(", ") if value is sequence and value is not string else value }}</td></tr>{% endfor %}</table>
"""


def evaluation_page(report: dict[str, Any]) -> str:
    """The page for what ``fastsft eval --json`` gives under ``tasks``; all text is escaped, nothing is loaded."""
    return render("pass@k", _BODY, report)
