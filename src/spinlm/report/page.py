"""A run on one page: what was played, what came of it, and what it rests on.

Reads the run folder only, and imports no torch. The page is a file of its own, with the charting library in it. It
loads nothing, and shows what models and data sets wrote as text.
"""

import json
from pathlib import Path
from typing import Any

from spinlm.errors import RunError
from spinlm.report.charts import charts
from spinlm.report.compare import compare_runs
from spinlm.report.run_data import Spent, facts
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import finite, short_digest, write_text

HERE = Path(__file__).parent

LONGEST = 20_000
"""Characters of a text that are shown."""


def write_report(run: RunDir, to: Path | None = None, *, other: RunDir | None = None) -> Path:
    """Write the page of a run that has ended, is under way, or has failed.

    Args:
        run: the run folder.
        to: the file to write, or a folder that is there; by default the run folder. In one it is `report.html`.
        other: another run, say the control, to say how the two stand against each other.

    Returns:
        The file.

    Raises:
        RunError: there is no run in the folder, a file of it is damaged, or the page cannot have this name.
    """
    if not run.recipe.exists():
        raise RunError(f"{run.root}: no run here. `spinlm run RECIPE` makes one")
    path = to or run.root
    path = path / "report.html" if path.is_dir() else path
    if path.is_dir():
        raise RunError(f"{path}: a folder stands where the page should be. Choose another --output")
    write_text(path, page(run, other).encode("utf-8", "replace").decode("utf-8"))  # half a character may stand anywhere
    return path


def page(run: RunDir, other: RunDir | None = None) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    known = facts(run)
    drawn = charts(known)
    data = _for_script({chart.name: chart.traces_and_layout() for chart in drawn})
    scripts = [get_plotlyjs(), (HERE / "page.js").read_text(encoding="utf-8")]
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": _number, "share": _share, "spent": _spent, "cut": _cut, "json": _json}
    return environment.get_template("page.html").render(
        facts=known,
        against=None if other is None else str(compare_runs(run, other)),
        sections=_by_section(drawn),
        data=Markup(data),
        scripts=[Markup(script) for script in scripts],
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        nonce=short_digest([data, *scripts]),
    )


def _by_section(drawn: list[Any]) -> dict[str, list[Any]]:
    return {section: [one for one in drawn if one.section == section] for section in ("players", "training", "time")}


def _for_script(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends one."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _cut(text: str) -> str:
    """The beginning of a text that is longer than anybody reads."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _spent(spent: Spent) -> str:
    """A time as people say it."""
    if spent.seconds is None:
        return "–"
    return ("at least " if spent.at_least else "") + _duration(spent.seconds)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
