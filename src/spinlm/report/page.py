"""Write a run as one HTML page that contains the charting library and loads nothing.

Reads the run folder only; imports no torch. Texts from models and data sets are escaped.
"""

import json
from pathlib import Path
from typing import Any

from spinlm.errors import RunError
from spinlm.report.charts import charts
from spinlm.report.compare import compare_runs
from spinlm.report.run_data import StageTime, run_data
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import finite, short_digest, write_text

HERE = Path(__file__).parent

MAX_CHARACTERS = 20_000
"""Longer texts are cut on the page."""


def write_report(folder: RunDir, output: Path | None = None, *, baseline: RunDir | None = None) -> Path:
    """Write the report of a run; the run may be in progress or have failed.

    Args:
        folder: the run folder.
        output: a file to write, or an existing folder to write `report.html` into; the default is the run folder.
        baseline: another run to compare with, such as the control.

    Returns:
        The file written.

    Raises:
        RunError: the folder holds no run, one of its files is damaged, or the output path is a folder.
    """
    if not folder.is_run():
        raise RunError(f"{folder.root}: no run here. `spinlm run RECIPE` makes one")
    path = output or folder.root
    path = path / "report.html" if path.is_dir() else path
    if path.is_dir():
        raise RunError(f"{path}: is a folder, not a file. Choose another --output")
    # "replace": a response may end inside a surrogate pair, which UTF-8 cannot encode
    write_text(path, render_page(folder, baseline).encode("utf-8", "replace").decode("utf-8"))
    return path


def render_page(folder: RunDir, baseline: RunDir | None = None) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    run = run_data(folder)
    sections = charts(run)
    all_charts = [chart for section in sections.values() for chart in section]
    chart_data = _script_json({chart.name: {"traces": chart.traces, "layout": chart.layout} for chart in all_charts})
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text(encoding="utf-8")]
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": _number, "duration": _duration, "shorten": _shorten}
    return environment.get_template("page.html").render(
        run=run,
        provenance=json.dumps(run.provenance, indent=1, ensure_ascii=False),
        comparison=None if baseline is None else str(compare_runs(folder, baseline)),
        charts=sections,
        chart_data=Markup(chart_data),
        scripts=[Markup(script) for script in scripts],
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        nonce=short_digest([chart_data, *scripts]),
    )


def _script_json(value: Any) -> str:
    """Return JSON without the characters that could end a script element."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(time: StageTime) -> str:
    """Format a time as seconds, minutes and seconds, or hours and minutes."""
    if time.seconds is None:
        return "–"
    bound = "at least " if time.lower_bound else ""
    if time.seconds < 60:
        return f"{bound}{time.seconds:.1f} s"
    minutes, seconds = divmod(round(time.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return bound + (f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s")
