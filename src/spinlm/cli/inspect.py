"""Commands that read a finished or a running run: status, list, report, chat and export."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from spinlm.cli.options import AsJson, Baseline, PlayersOption, RunPath, parse_players, read_run
from spinlm.errors import RunError, SpinError
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START, player_name, stage_label
from spinlm.utils.atomic import finite
from spinlm.utils.console import console, printable


def status(run: RunPath, baseline: Baseline = None, as_json: AsJson = False) -> None:
    """Show the progress and the players of a run."""
    from spinlm.report import compare, summary
    from spinlm.report.regimes import regimes
    from spinlm.report.status import last_error, run_status, stage_progress

    folder, _ = read_run(run)
    if as_json:
        print_status(folder, baseline)
        return
    out = console(100)
    state = run_status(folder)
    out.print(str(state))
    if progress := stage_progress(folder, state):
        out.print(progress)
    if error := last_error(folder):
        out.print(printable(f"The last attempt ended with: {error}"))
    if summary.player_rows(folder):
        out.print(summary.table(folder))
    for regime in regimes(folder):
        out.print(f"Iteration {regime.iteration}: {regime.text}")
    so_far = "So far: " if state.stage and summary.promotions(folder) else ""
    out.print(so_far + summary.verdict(folder))
    if baseline is not None:
        out.print(printable(str(compare.compare_runs(folder, RunDir(baseline)))))


def print_status(folder: RunDir, baseline: Path | None = None) -> None:
    """Print the status of a run as one JSON object."""
    from spinlm.report import compare
    from spinlm.report.status import status_json

    data = status_json(folder)
    if baseline is not None:
        comparison = compare.compare_runs(folder, RunDir(baseline))
        data["baseline"] = asdict(comparison) | {"result": comparison.result, "summary": str(comparison)}
    print(json.dumps(data))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Compare these runs. RUN:NUMBER or RUN:best chooses a player.", show_default=False),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(help="Compare with this player: RUN, RUN:NUMBER or RUN:best. The default is the start."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs that share a start, in one table.

    Of each run, the last player that has not collapsed is compared, prompt by prompt.
    """
    from spinlm.report.players_table import compare as compare_players

    compared = compare_players(runs, baseline)
    if as_json:
        print(json.dumps(finite(compared.as_json())))
        return
    out = console(120)
    out.print(compared.table())
    out.print(printable(str(compared)))


def list_runs(
    folder: Annotated[Path, typer.Argument(help="Search this folder for run folders.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from rich.box import SIMPLE
    from rich.table import Table

    from spinlm.report.status import find_runs, list_status_json

    runs = list_status_json(find_runs(folder))
    if as_json:
        for run in runs:
            print(json.dumps(run))
        return
    if not runs:
        print(f"no runs in {folder}")
        return
    grid = Table("run", "state", "players", "best", "outcome", box=SIMPLE, pad_edge=False)
    for run in runs:
        stage = "" if run["stage"] is None else f", {stage_label((run['stage'], run['iteration']))}"
        best = "–" if run["best"] is None else player_name(run["best"])
        outcome = run["verdict"] if run["state"] == "damaged" else run["outcome"] or "–"
        cells = Path(run["run"]).name, run["state"] + stage, str(len(run["players"])), best, outcome
        grid.add_row(*map(printable, cells))
    console(160).print(grid)


def report(
    run: RunPath,
    output: Annotated[
        Path | None, typer.Option(help="Write this file. The default is report.html in the run folder.")
    ] = None,
    baseline: Baseline = None,
) -> None:
    """Write a report of a run as one HTML page.

    Works for a run that is unfinished or failed, too.
    """
    from spinlm.report.page import write_report
    from spinlm.report.summary import player_rows

    folder = RunDir(run)
    print(f"wrote {write_report(folder, output, baseline=None if baseline is None else RunDir(baseline))}")
    if not player_rows(folder):
        print("No player has been evaluated yet.")


def chat(
    run: RunPath,
    iteration: PlayersOption = "start,best",
    prompt: Annotated[str | None, typer.Option(help="Send this prompt and exit. Without it, type prompts.")] = None,
    system: Annotated[str | None, typer.Option(help="Set the system prompt. Use the one of your data.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Set the temperature. 0 decodes greedily.")] = 0.0,
) -> None:
    """Compare responses of players to a prompt."""
    from spinlm.chat import print_responses
    from spinlm.errors import RowError
    from spinlm.model.run import Run

    folder, recipe = read_run(run)
    players = parse_players(folder, iteration)
    opened = Run(recipe, folder)
    history = [{"role": "system", "content": system}] if system else []

    for text in _typed_prompts() if prompt is None else [prompt]:
        try:
            print_responses(opened, players, [*history, {"role": "user", "content": text}], temperature)
        except RowError as error:
            message = f"this prompt cannot be used: {error}"
            if prompt is not None:
                raise SpinError(message) from error
            print(message)


def _typed_prompts() -> Iterator[str]:
    if sys.stdin.isatty():
        print("(Each prompt starts a new conversation. Ctrl-D exits.)")
    with contextlib.suppress(EOFError):
        while True:
            if (text := input("you> ")).strip():
                yield text


def export(
    run: RunPath,
    output: Annotated[Path, typer.Option(help="Write this folder.", show_default=False)],
    iteration: Annotated[
        str | None,
        typer.Option(help="Choose the player: a number, `start` or `best`. The default is `best`."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Store a whole model in this precision. `auto` merges in the base model's."),
    ] = "auto",
    license: Annotated[
        str | None, typer.Option(help="Set the license in the model card. The default is the base model's.")
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Export the training pairs of an iteration for TRL instead of a player.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the folder to this repository. A new one is private.")
    ] = None,
) -> None:
    """Export a player, or the training pairs.

    A player is a PEFT adapter or, merged, a whole model. A model card is written with it.
    """
    from spinlm.export.pairs import export_pairs
    from spinlm.export.player import export as export_player
    from spinlm.export.player import push
    from spinlm.rundir.player_names import parse_player

    folder, recipe = read_run(run)
    if pairs:
        if merge or license or dtype != "auto":
            raise RunError("--merge, --dtype and --license cannot be used with --pairs. Leave them out")
        if iteration is not None and not iteration.isdecimal():
            raise RunError(f"--iteration {iteration}: with --pairs, give the number of an iteration")
        summary = export_pairs(recipe, folder, None if iteration is None else int(iteration), output)
        print(f"wrote {output} ({summary})")
    else:
        player = parse_player(folder, iteration or "best")
        precision = None if dtype == "auto" else dtype
        export_player(recipe, folder, player, output, merge=merge, license=license, dtype=precision)
        note = "; no iteration beat the start" if iteration in (None, "best") and player == START else ""
        print(f"wrote {output} ({folder.iteration(player).name}{note})")
    if push_to_hub:
        print(f"pushed to {push(output, push_to_hub, recipe, dataset=pairs)}")
