"""One training run, or several compared, as one self-contained HTML page."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from typing import Any

from fastsft.config import load_config, to_dict
from fastsft.report import plots
from fastsft.report.page import render
from fastsft.report.run import Run, differences, leaves

_BODY = """\
{% if not figures %}<p class="note">Plots need matplotlib: pip install "fastsft[report]".</p>{% endif %}
<table><tr><th></th>{% for run in runs %}<th>{{ run.name }}</th>{% endfor %}</tr>
{% for name, values in results %}<tr><td>{{ name }}</td>
{% for value in values %}<td class="n">{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
<p class="note">Losses are in nats per unit of token weight. Early: means over the first 5 % of the steps, at most 100;
low gradient norms with higher losses early foretell the better of several runs on the same data (arXiv 2412.13337).</p>
<div>{% for figure in figures %}{{ figure | safe }}{% endfor %}</div>
{% if runs | length > 1 %}<h2>Settings that differ</h2>
<table><tr><th>key</th>{% for run in runs %}<th>{{ run.name }}</th>{% endfor %}</tr>
{% for name, values in differ %}<tr><td>{{ name }}</td>{% for v in values %}<td>{{ v }}</td>{% endfor %}</tr>
{% else %}<tr><td>none</td></tr>{% endfor %}</table>{% endif %}
{% for run in runs %}
{% if runs | length > 1 %}<h1>{{ run.name }}</h1>{% endif %}
<p>{{ run.plan }}</p>
{% if run.signals %}<h2>Signals</h2>
<table><tr><th>step</th><th></th><th>value</th><th>centre</th><th>samples</th></tr>
{% for s in run.signals %}<tr><td class="n">{{ s.step }}</td><td>{{ s.name }}</td>
<td class="n">{{ s.value | figure }}</td><td class="n">{{ s.centre | figure }}</td>
<td>{{ s.samples[:20] | join(", ") }}{% if s.samples | length > 20 %} and {{ s.samples | length - 20 }} more{% endif %}
</td></tr>{% endfor %}</table>{% endif %}
{% if run.samples %}<h2>Samples</h2>
{% for prompt, outputs in run.samples.items() %}<pre>{{ prompt }}</pre><table>
{% for s in outputs %}<tr><td class="n">{{ s.step }}</td><td><pre>{{ s.text }}</pre></td></tr>{% endfor %}</table>
{% endfor %}{% endif %}
{% if run.passed %}<h2>Held-out tasks</h2>
<table>{% for p in run.passed %}<tr><td class="n">step {{ p.step }}</td>{% for k, value in p.pass_at.items() %}
<td>pass@{{ k }} {{ "%.3f" | format(value) }}</td>{% endfor %}
<td>{% for status, n in p.statuses.items() %}{{ n }} {{ status }} {% endfor %}</td></tr>{% endfor %}</table>{% endif %}
{% if run.data %}<h2>Data</h2>
<p>{{ run.data.rows | figure }} rows read.</p>
<table><tr><th></th><th>samples</th><th>tokens</th><th>trained</th></tr>
{% for p in run.parts %}<tr><td>{{ p.name }}</td><td class="n">{{ p.samples | figure }}</td>
<td class="n">{{ p.tokens | figure }}</td><td class="n">{{ p.trained_tokens | figure }}</td></tr>{% endfor %}</table>
{% for line in run.notices %}<p class="note">{{ line }}</p>{% endfor %}{% endif %}
<h2>Settings</h2><p class="note">Those that are not the default.</p>
<table>{% for name, value in run.settings %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
{% if run.environment %}<h2>Environment</h2>
<table>{% for name, value in run.environment %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
{% endif %}
{% endfor %}
"""


def runs_page(runs: list[Run]) -> str:
    """All text is escaped, nothing is loaded from elsewhere."""
    summaries = [run.summary() for run in runs]
    for run, summary in zip(runs, summaries, strict=True):
        summary["time"] = datetime.timedelta(seconds=round(sum(run.seconds().values())))
    names = [
        name for name in summaries[0] if name not in ("run", "hours") and any(s[name] is not None for s in summaries)
    ]
    values = {
        "runs": [_details(run) for run in runs],
        "results": [(name, [_FORMS.get(name, figure)(s[name]) for s in summaries]) for name in names],
        "differ": differences(runs) if len(runs) > 1 else [],
        "figures": _figures(runs) if plots.available() else [],
    }
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"Runs {', '.join(run.name for run in runs)}"
    return render(title, _BODY, values, filters={"figure": figure})


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


_FORMS: dict[str, Callable[[Any], str]] = {"MFU": _share}


def _details(run: Run) -> dict[str, Any]:
    from fastsft.data.notices import notices

    data = run.about.get("data", {})
    samples: dict[str, list[dict[str, Any]]] = {}
    for row in run.of("sample"):
        samples.setdefault(row["prompt"], []).append({"step": row["step"], "text": row["text"]})
    defaults = dict(leaves(to_dict(load_config({}))))
    return {
        "name": run.name,
        "plan": run.about.get("plan", "The run has made no step."),
        "signals": run.of("signal"),
        "samples": samples,
        "passed": run.of("pass_at_k"),
        "data": data,
        "parts": [{"name": n, **data[n]} for n in ("train", "eval") if n in data]
        + [{**s, "name": f"source {s['name']}"} for s in data.get("sources", []) if len(data["sources"]) > 1],
        "notices": list(notices(data)) if data else [],
        "settings": [(n, v) for n, v in leaves(run.config) if n not in defaults or defaults[n] != v],
        "environment": [(n, v) for n, v in _environment(run.about)],
    }


def _environment(about: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    if "environment" in about:
        yield "torch threads", about["torch_threads"]
        yield "matrix product", f"{about['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        found = about["environment"]
        for name, value in leaves({k: v for k, v in found.items() if k != "ops"}):
            if value is not None and value != []:
                yield name, value
        kinds = {op: served["cpu"]["kind"] for op, served in found["ops"].items()}  # where runs train
        for kind in sorted(set(kinds.values()) - {"none"}):
            yield f"ops: {kind}", ", ".join(op for op in kinds if kinds[op] == kind)


def _figures(runs: list[Run]) -> list[str]:
    alone = len(runs) == 1

    def curves(*given: tuple[str, str, str]) -> list[plots.Series]:
        """Of (label, key, kind), of each run."""
        found = [
            (label if alone else f"{run.name} {label}".strip(), *run.curve(key, kind))
            for run in runs
            for label, key, kind in given
        ]
        return [one for one in found if one[1]]

    def parts(key: str) -> list[plots.Series]:
        found = [(run, run.parts(key)) for run in runs]
        return [
            (part if alone else f"{run.name} {part}", *curve)
            for run, each in found
            if len(each) > 1
            for part, curve in each.items()
        ]

    name = "training" if alone else ""
    drawn: list[tuple[str, str, list[plots.Series]]] = [
        ("loss", "nats", curves((name, "loss", "step"), ("held-out", "loss", "eval"))),
        ("loss by source", "nats", parts("sources")),
        ("loss by segment", "nats", parts("segments")),
        ("learning rate", "rate", curves((name, "lr", "step"))),
        ("gradient norm", "norm", curves((name, "grad_norm", "step"))),
        ("throughput", "tokens/s", curves((name, "tokens_per_second", "step"))),
        ("pass@k", "share", _pass_curves(runs)),
    ]
    figures = [plots.lines(title, "step", unit, series) for title, unit, series in drawn if series]
    spent = [(run, run.seconds()) for run in runs if run.of("step")]
    for run, seconds in spent:
        title = "time per phase" if alone else f"time per phase, {run.name}"
        labels = [n.replace("forward_backward", "forward,\nbackward") for n in seconds]
        figures.append(plots.bars(title, "seconds", labels, list(seconds.values()), "{:,.1f}"))
    return figures


def _pass_curves(runs: list[Run]) -> list[plots.Series]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for run in runs:
        for row in run.of("pass_at_k"):
            for k, value in row["pass_at"].items():
                x, y = series.setdefault(f"pass@{k}" if len(runs) == 1 else f"{run.name} pass@{k}", ([], []))
                x.append(row["step"])
                y.append(value)
    return [(label, *points) for label, points in series.items()]


def figure(value: Any) -> str:
    """A number as people read it."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"@{k} {v:.3f}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
