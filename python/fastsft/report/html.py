"""The demo's results as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsft.report import plots

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastsft demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem;
       color: #1f2933; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #d9e0e7; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { padding: .25rem .8rem; text-align: left; vertical-align: top; }
tr:nth-child(even) { background: #f4f6f8; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f4f6f8; padding: .6rem; overflow-x: auto; margin: .2rem 0; font-size: 13px; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { max-width: 520px; height: auto; }
mark { background: #cfe6cf; } .bad { color: #a12622; } .good { color: #1d6b2f; } .note { color: #52606d; }
</style></head><body>
<h1>fastsft demo</h1>
<p class="note">{{ machine }}</p>
<table>
{% for name, before, after in headline %}
<tr><th>{{ name }}</th><td class="n">{{ before }}</td><td class="n">{{ after }}</td></tr>
{% endfor %}</table>
{% if not figures %}<p class="note">Plots need matplotlib: pip install "fastsft[report]".</p>{% endif %}
<div class="plots">{% for figure in figures %}{{ figure | safe }}{% endfor %}</div>
<h2>Duplicates</h2>
<p>{{ dedup.kept }} of {{ dedup.records }} definitions kept: {{ dedup.exact_duplicates }} exact and
{{ dedup.near_duplicates }} near duplicates.</p>
<table><tr><th>size</th><th>members</th><th>begins with</th></tr>
{% for c in dedup.clusters[:8] %}
<tr><td class="n">{{ c.size }}</td>
<td>{{ c.sources[:4] | map("base") | join(", ") }}</td>
<td><pre>{{ c.example[:160] }}</pre></td></tr>{% endfor %}</table>
<h2>Held-out tasks</h2>
<p>Each task asks for one small Python function over a name and a number. The kinds of function are those of the
training conversations; held out are the names, and each pair of kind and number: neither occurs in training. An answer
passes only if it is right on every input of its check, among them those next to the number; pass@1 is the share of the
{{ tasks }} tasks whose one greedy answer passes. Below are some that passed and some that failed, if any did. Executed
with {{ layers | join(", ") }}.</p>
<table>{% for a in answers %}<tr><td>{{ a.prompt }}<pre>{{ a.answer }}</pre></td>
<td class="{{ 'good' if a.passed else 'bad' }}">{{ 'passed' if a.passed else 'failed' }}</td></tr>{% endfor %}</table>
<h2>Training speed</h2>
<p>The padded loop is the usual one in plain PyTorch: the same weights, samples, optimizer and type, in batches of
{{ speed.rows }} documents padded to the longest of them, torch's attention, all logits, torch's cross-entropy.
{{ "%.0f" | format(100 * speed.padding_share) }} % of what it computes is padding; tokens/s count the others, for
both.</p>
<h2>Completions</h2>
<p>Of definitions that were held out, by the model before tuning; what it wrote is marked.</p>
{% for s in samples.completions %}<pre>{{ s.prompt }}<mark>{{ s.output }}</mark></pre>{% endfor %}
<h2>Infills</h2>
<p>One line was taken out of a held-out definition without a docstring; what the model wrote in its place, in
suffix-prefix-middle order, is marked.</p>
{% for s in samples.infills %}<pre>{{ s.prefix }}<mark>{{ s.output }}</mark>{{ s.suffix }}</pre>
<p class="note">original: <code>{{ s.reference }}</code></p>{% endfor %}
<h2>Times</h2>
<table>{% for name, s in seconds.items() %}
<tr><td>{{ name }}</td><td class="n">{{ "%.1f" | format(s) }} s</td></tr>{% endfor %}</table>
</body></html>
"""


def write_report(
    folder: Path, results: dict[str, Any], train_metrics: list[dict[str, Any]], tune_metrics: list[dict[str, Any]]
) -> Path:
    """Render ``report.html`` in ``folder``; all text is escaped, nothing is loaded from elsewhere."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["base"] = lambda source: Path(str(source)).name
    train, tune, passed, speed = results["train"], results["tune"], results["pass_at_1"], results["speed"]
    cpu = results["info"]["cpu"]
    page = environment.from_string(_PAGE).render(
        machine=f"{results['parameters'] / 1e6:.1f} M parameters, {results['dtype']}, {cpu['isa_active']}, "
        f"{results['torch_threads']} torch threads and {cpu['threads']} of ours on {cpu['cores']} cores, "
        f"{results['total_seconds']:.0f} s in all",
        headline=[
            ("", "before", "after"),
            ("held-out loss on code (nats)", f"{train['loss_before']:.3f}", f"{train['loss_after']:.3f}"),
            ("held-out loss on instructions (nats)", f"{tune['loss_before']:.3f}", f"{tune['loss_after']:.3f}"),
            ("pass@1 on held-out tasks", *(f"{passed[k]['pass_at']['1']:.2f}" for k in ("before", "after"))),
            ("tokens/s: padded PyTorch loop, fastsft", f"{speed['padded']:,.0f}", f"{speed['ours']:,.0f}"),
        ],
        figures=_figures(results, train_metrics, tune_metrics) if plots.available() else [],
        dedup=results["prepare"]["dedup"],
        answers=results["answers"],
        tasks=len(passed["after"]["tasks"]),
        layers=results["layers"],
        speed=speed,
        samples=results["samples"],
        seconds=results["seconds"],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(results: dict[str, Any], train: list[dict[str, Any]], tune: list[dict[str, Any]]) -> list[str]:
    passed, speed = results["pass_at_1"], results["speed"]
    return [
        plots.lines("training on code", "step", "loss, nats", _curves(train)),
        plots.lines("tuning on instructions", "step", "loss, nats", _curves(tune)),
        plots.bars(
            "pass@1 on held-out tasks",
            "share passed",
            ["before tuning", "after"],
            [passed["before"]["pass_at"]["1"], passed["after"]["pass_at"]["1"]],
        ),
        plots.bars(
            "training speed, same model and samples",
            "tokens/s",
            ["padded PyTorch loop", "fastsft"],
            [speed["padded"], speed["ours"]],
            "{:,.0f}",
        ),
        plots.histogram(
            "near-duplicate clusters",
            "members of the cluster",
            {int(k): v for k, v in results["prepare"]["dedup"]["cluster_sizes"].items()},
        ),
    ]


def _curves(metrics: list[dict[str, Any]]) -> list[plots.Series]:
    curves: list[plots.Series] = []
    for label, kind in (("training", "step"), ("held-out", "eval")):
        points = [m for m in metrics if m["kind"] == kind]
        curves.append((label, [m["step"] for m in points], [m["loss"] for m in points]))
    return curves
