"""The report page: its content for finished and unfinished runs, and that data cannot inject HTML."""

import fcntl
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from runs import HELDOUT, ITERATIONS, change_marker, change_recipe, read_jsons, write_rows

from spinlm.evals.scores import Score, add_scores
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START

EVIL = "document.title='taken'"
HOSTILE = f'</script><script>{EVIL}</script><img src=x onerror="{EVIL}"> & \x1b[31m \u2028 \x85 {{{{ 7 * 7 }}}}'
CHARTS = (
    "task_score",
    "heldout_nll",
    "real_vs_generated",
    "margins",
    "lengths",
    "kl_from_start",
    "collapse",
    "step_loss",
    "step_margin",
    "time",
)


class Page(HTMLParser):
    """A parsed page: its elements, texts, scripts and links."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def charts(self) -> dict[str, Any]:
        charts: dict[str, Any] = json.loads(self.scripts[0])
        return charts


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    return shutil.copytree(reference, tmp_path / "run", symlinks=True)


def test_a_finished_run(run, cli, tmp_path):
    result = cli("report", run, folder=tmp_path)
    path = run / "report.html"
    assert result.out == f"wrote {path}\n"
    page = Page(path)
    assert "The run is finished." in page.text
    assert re.search(r"Self-play (helped|did not help)", page.text)
    for name in ("start", "iteration 0", "iteration 1"):
        assert name in page.text
    assert set(CHARTS) <= page.charts.keys()
    measured = [json.loads((run / name / "eval.json").read_text()) for name in ("start", "iteration-0", "iteration-1")]
    (shown,) = page.charts["heldout_nll"]["traces"]
    assert shown["y"] == [metrics["heldout_nll"] for metrics in measured]
    low, high = measured[0]["intervals"]["heldout_nll"]
    assert shown["error_y"]["array"][0] == pytest.approx(high - shown["y"][0])
    assert shown["error_y"]["arrayminus"][0] == pytest.approx(shown["y"][0] - low)
    margins = page.charts["margins"]["traces"][0]["y"]
    assert sum(margins) / len(margins) == pytest.approx(measured[1]["margin"])
    losses = {trace["name"]: trace["y"] for trace in page.charts["step_loss"]["traces"]}
    assert losses["iteration 1"] == [
        line["loss"]
        for line in read_jsons(run, "train_log.jsonl")
        if (line["stage"], line["iteration"]) == ("train", 1)
    ]
    for answer in read_jsons(run / "iteration-1", "heldout_greedy.jsonl"):
        assert " ".join(answer["text"].replace("\0", "�").split()) in page.text
    for iteration in (0, 1):
        margins = json.loads((run / ".spinlm" / f"iteration-{iteration}" / "train.done").read_text())["margin_by_epoch"]
        reached = ", ".join(f"{0.1 * margin:.2f}" for margin in margins)  # β = 0.1
        assert re.search(rf"Iteration {iteration}: .{{20,1000}} β·margin by epoch: {reached} \(forecast ", page.text)
    assert "prompt in heldout" in page.text and "data.jsonl:43" in page.text
    assert "tokens_per_micro_batch: 128" in page.text


def test_the_page_loads_nothing(run, cli, tmp_path):
    cli("report", run, "--output", tmp_path / "page.html", folder=tmp_path)
    page = Page(tmp_path / "page.html")
    assert not (run / "report.html").exists()
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.elements)
    assert "default-src 'none'" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("stage", ["generate", "reference_logprobs", "regime", "train", "evaluate", "promote"])
def test_a_run_that_stopped(rewound, cli, tmp_path, stage):
    run = rewound(1, stage)
    cli("report", run, folder=tmp_path)
    assert f"The run is not finished: {stage} of iteration 1 is not complete." in Page(run / "report.html").text


def test_a_run_without_stages(run, cli, tmp_path):
    for entry in run.iterdir():
        if entry.name not in ("recipe.yaml", ".spinlm"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in (run / ".spinlm").iterdir():
        if entry.name not in ("digests", "lock"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    cli("report", run, folder=tmp_path)
    page = Page(run / "report.html")
    assert "prepare is not complete" in page.text and "No player has been evaluated yet." in page.text
    assert page.charts == {}


def forget_digests(run: Path) -> None:
    """Make the files that a test changes count as unchanged."""
    for marker in run.glob(".spinlm/*/*.done"):
        change_marker(marker, outputs={})


def test_a_run_without_a_scorer_and_without_margins(run, cli, tmp_path):
    """Wins and losses are then by NLL."""
    for folder in run.glob("*/heldout_greedy.jsonl"):
        rows = read_jsons(folder.parent, folder.name)
        write_rows(folder, [{key: value for key, value in row.items() if key != "margins"} for row in rows])
    change_recipe(run, evaluate={"scorer": None})
    forget_digests(run)
    cli("report", run, folder=tmp_path)
    page = Page(run / "report.html")
    assert "margins" not in page.charts
    assert "NLL of the real response" in page.text
    before, after = (
        {row["id"]: row["nll"] for row in read_jsons(run / name, "heldout_greedy.jsonl")}
        for name in ("start", "iteration-1")
    )
    best = max(before[key] - after[key] for key in before)
    assert f"{best:+.3f}" in page.text


def test_a_run_under_way(rewound, cli, tmp_path):
    run = rewound(1, "train")
    with (run / "train_log.jsonl").open("a") as file:
        file.write('{"stage": "train", "iterat')  # a line that is still being written
    with (run / ".spinlm" / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cli("report", run, folder=tmp_path)
    assert "The run is in progress: train of iteration 1." in Page(run / "report.html").text


def test_no_run(cli, tmp_path):
    result = cli("report", tmp_path, folder=tmp_path, code=2)
    assert "no run here" in result.message


def poison(run: Path) -> None:
    """Hostile text wherever a model or data set could have written it."""
    for name in ("start", *(f"iteration-{iteration}" for iteration in range(ITERATIONS))):
        rows = read_jsons(run / name, "heldout_greedy.jsonl")
        write_rows(run / name / "heldout_greedy.jsonl", [row | {"text": HOSTILE} for row in rows])
    rows = read_jsons(run / "examples", "heldout.jsonl")
    for row in rows:
        row["messages"] = [{"role": HOSTILE, "content": HOSTILE} for _ in row["messages"]]
        row["response"] = HOSTILE
    write_rows(run / "examples" / "heldout.jsonl", rows)
    skipped = json.loads((run / "examples" / "skipped_rows.json").read_text())
    skipped |= {"skipped": {HOSTILE: 1}, "skipped_rows": [HOSTILE]}
    (run / "examples" / "skipped_rows.json").write_text(json.dumps(skipped))
    change_recipe(run, data={"path": HOSTILE})
    forget_digests(run)


def test_texts_of_data_and_models_are_escaped(run, cli, tmp_path):
    cli("report", run, folder=tmp_path)
    clean = Page(run / "report.html")
    poison(run)
    cli("report", run, folder=tmp_path)
    page = Page(run / "report.html")
    assert set(page.elements) == set(clean.elements)
    assert page.elements.count("script") == clean.elements.count("script") == 3
    assert page.scripts[1:] == clean.scripts[1:]
    assert page.text.count(" ".join(HOSTILE.split())) > 20


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("hostile", [False, True])
def test_in_a_browser(run, cli, tmp_path, hostile):
    if hostile:
        poison(run)
    cli("report", run, folder=tmp_path)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}"]
    command = [CHROMIUM, *options, "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([*command, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert "<title>run · spinlm</title>" in done.stdout
    for name in CHARTS:
        (figure,) = re.findall(rf'<div[^>]* id="chart-{name}"[^>]*>', done.stdout)
        assert "js-plotly-plot" in figure, f"{name} has no chart"
    assert done.stdout.count("main-svg") >= len(CHARTS)


def test_the_page_goes_into_a_folder_without_replacing_it(run, cli, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    output = cli("report", run, "--output", "other", folder=tmp_path).out
    assert output == "wrote other/report.html\n"
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"thesis.txt", "report.html"}
    (tmp_path / "other" / "report.html").unlink()
    (tmp_path / "other" / "report.html").mkdir()
    assert "is a folder" in cli("report", run, "--output", "other", folder=tmp_path, code=2).message


@pytest.mark.parametrize(
    "name", ["iteration-1/heldout_greedy.jsonl", "examples/heldout.jsonl", "iteration-1/eval.json"]
)
def test_a_damaged_file_is_named(run, cli, tmp_path, name):
    (run / name).write_bytes((run / name).read_bytes()[:-20])
    assert cli("report", run, folder=tmp_path, code=2).message.startswith(f"{run / name}")
    (run / name).write_text("{}\n")  # valid JSON, but not what spinlm wrote
    assert f"{run / name}: has changed" in cli("report", run, folder=tmp_path, code=2).message
    (run / name).unlink()
    assert f"{run / name}: is missing" in cli("report", run, folder=tmp_path, code=2).message


def test_damaged_lines_of_the_log_are_skipped(run, cli, tmp_path):
    with (run / "train_log.jsonl").open("a") as file:
        file.write('7\n[]\n{"stage": "train", "iteration": 1, "step": 99, "steps": 99, "loss": NaN}\n')
    cli("report", run, folder=tmp_path)
    page = Page(run / "report.html")
    losses = {trace["name"]: trace["y"] for trace in page.charts["step_loss"]["traces"]}
    assert losses["iteration 1"][-1] is None
    assert cli("status", run, folder=tmp_path).out.startswith("The run is finished.")
    values = json.loads(cli("status", run, "--json", folder=tmp_path).out, parse_constant=pytest.fail)
    assert values["last_step"]["loss"] is None


def test_times_of_resumed_stages(run, cli, tmp_path):
    change_marker(run / ".spinlm" / "iteration-1" / "train.done", resumed=True, seconds=90.0)
    cli("report", run, folder=tmp_path)
    page = Page(run / "report.html")
    assert "train at least 1 min 30 s" in page.text
    assert re.search(r"Total: at least \d+ min \d+ s on 1 process, at least 0\.\d+ device-hours", page.text)


def test_benchmarks(run, cli, tmp_path):
    score = Score(0.25, 0.125, "acc", 8, {})
    for iteration in (START, 1):
        add_scores(RunDir(run), iteration, "tasks", {"<b>own</b>": score})
    cli("report", run, folder=tmp_path)
    page = Page(run / "report.html")
    assert "tasks metric examples start iteration 1 <b>own</b> acc 8 0.250 ± 0.125 0.250 ± 0.125" in page.text


def test_comparison_with_a_baseline(run, reference, cli, tmp_path):
    cli("report", run, "--baseline", reference, folder=tmp_path)
    text = f"{run} vs {reference} after iteration 1: no difference beyond 2 standard errors."
    assert text in Page(run / "report.html").text
    assert text in " ".join(cli("status", run, "--baseline", reference, folder=tmp_path).out.split())
    values = json.loads(cli("status", run, "--baseline", reference, "--json", folder=tmp_path).out)["baseline"]
    assert values["summary"].startswith(text) and (values["mean_difference"], values["prompts"]) == (0.0, HELDOUT)
    assert "no run here" in cli("report", run, "--baseline", tmp_path, folder=tmp_path, code=2).message
