"""Commands that measure players on public benchmarks."""

from pathlib import Path
from typing import Annotated

import typer

from spinlm.cli.options import PlayersOption, Quiet, RunPath, parse_players, read_run
from spinlm.utils.console import console, printable


def benchmark(
    run: RunPath,
    iteration: PlayersOption = "start,best",
    suite: Annotated[
        str | None, typer.Option(help="Measure a suite: open-llm-leaderboard, big-bench, leaderboard-v2 or ifeval.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Measure these tasks, separated by commas.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Set the number of few-shot examples.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Limit the examples per task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Add the task YAML files in this folder.")] = None,
    apply_chat_template: Annotated[
        bool | None,
        typer.Option(
            help="Apply the player's chat template to prompts. The default is the suite's.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Set the number of requests per batch.")] = 8,
    quiet: Quiet = False,
) -> None:
    """Measure players with lm-evaluation-harness."""
    from spinlm.evals import scores
    from spinlm.evals.lm_harness.measure import HarnessOptions, run_lm_harness
    from spinlm.model.run import Run
    from spinlm.utils.signals import graceful_shutdown

    folder, recipe = read_run(run)
    players = parse_players(folder, iteration)
    options = HarnessOptions(suite, tasks, num_fewshot, limit, include_path, apply_chat_template, batch_size)
    with folder.locked(), graceful_shutdown():
        run_lm_harness(Run(recipe, folder), players, options)
    console(200).print(scores.rich_table(folder, players, suite or "tasks"))


def mt_bench(
    run: RunPath,
    judge: Annotated[Path, typer.Option(help="Read the judge's settings from this YAML file.", show_default=False)],
    questions: Annotated[Path, typer.Option(help="Read questions from MT-Bench's question.jsonl.", show_default=False)],
    references: Annotated[Path | None, typer.Option(help="Read reference answers from this .jsonl file.")] = None,
    iteration: PlayersOption = "start,best",
    pairwise: Annotated[bool, typer.Option("--pairwise", help="Compare players with the first one.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this number of questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit a player's response to this length.")] = 1024,
    quiet: Quiet = False,
) -> None:
    """Measure players with MT-Bench and a judge."""
    from spinlm.evals import scores
    from spinlm.evals.mt_bench.run import run_mt_bench, suite_name
    from spinlm.model.run import Run
    from spinlm.utils.signals import graceful_shutdown

    folder, recipe = read_run(run)
    players = parse_players(folder, iteration)
    with folder.locked(), graceful_shutdown():
        notes = run_mt_bench(
            *(Run(recipe, folder), players, judge, questions, references),
            limit=limit,
            pairwise=pairwise,
            max_new_tokens=max_new_tokens,
        )
    out = console(200)
    out.print(scores.rich_table(folder, players, suite_name(pairwise)))
    for note in notes:
        out.print(printable(note))
