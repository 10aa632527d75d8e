"""The command line: parse, call, print. Heavy modules are imported inside the commands."""

import contextlib
import errno
import io
import json
import logging
import os
import shlex
import shutil
import sys
import warnings
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spinlm.errors import PeerError, RunError, SpinError, is_out_of_memory
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START, player_name, stage_label
from spinlm.utils.atomic import STORAGE_ERRNOS
from spinlm.utils.console import console, printable

if TYPE_CHECKING:
    from spinlm.recipe.schema import Recipe

app = typer.Typer(
    name="spinlm",
    help="Improve a fine-tuned language model by self-play (SPIN, arXiv 2401.01335), from the data it was tuned on.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help comes in half the time
    add_completion=False,
    pretty_exceptions_enable=False,
)

NOISY = ("transformers", "huggingface_hub", "httpx", "accelerate", "datasets", "peft", "lm_eval", "bitsandbytes")
"""Libraries whose log lines are not shown, unless they are errors."""

RecipePath = Annotated[Path, typer.Argument(help="Recipe, a YAML file; `spinlm init` writes one.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe: section.key=value.", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]


def _hush(quiet: bool) -> bool:
    if quiet:
        told = logging.getLogger()
        told.setLevel(max(told.level, logging.WARNING))
    return quiet


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only warnings and the result.", callback=_hush)]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
RunOption = Annotated[Path | None, typer.Option(help="Run folder; the default is runs/NAME-OF-THE-RECIPE.")]
RunComparison = Annotated[
    Path | None,
    typer.Option(help="Another run, say the control: how both stand after the last iteration that both have played."),
]
Iteration = Annotated[int, typer.Option(help="Iteration, from 0.", show_default=False)]


@app.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show_version:
        print(f"spinlm {version('spinlm')}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    run_dir: RunOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left in the folder.")] = False,
    start_from: Annotated[
        Path | None, typer.Option(help="Begin with the starting player of another run, to compare what follows.")
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, as `spinlm status` does.")] = False,
) -> None:
    """Play a recipe to its end, or on from where it stopped."""
    loaded = _load(recipe, overrides)
    folder = _run_folder(recipe, run_dir)

    from spinlm import selfplay
    from spinlm.distributed.processes import is_main_process

    finished = selfplay.run(loaded, folder, fresh=fresh, start_from=start_from)
    if is_main_process():
        _print_status(finished) if as_json else _print_result(finished)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    run_dir: RunOption = None,
    processes: Annotated[
        int, typer.Option(min=1, envvar="WORLD_SIZE", help="How many the run is spread over, one on each device.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe will take. Pairs, steps, tokens, memory, disk, time: without weights, without network."""
    from rich.console import Console

    from spinlm.plan import as_data, make_plan, refusals, render

    loaded = _load(recipe, overrides)
    found = make_plan(loaded, RunDir(_run_folder(recipe, run_dir)), processes)
    if as_json:
        print(json.dumps(as_data(found)))
    else:
        Console().print(render(found))
    if any(refusals(found)):
        raise typer.Exit(RunError.exit_code)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Try everything a run needs once. Template, end token, ln 2, prefix_sharing, precision, memory, a few prompts."""
    loaded = _load(recipe, overrides)

    from spinlm.check import check as check_recipe

    for line in check_recipe(loaded):
        print(printable(line), flush=True)


@app.command()
def generate(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Let the opponent of an iteration answer every prompt."""
    _stage("generate", run, iteration)


@app.command()
def score(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Score the responses of an iteration with its opponent."""
    _stage("reference_logprobs", run, iteration)


@app.command()
def train(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Train the main player of an iteration."""
    _stage("train", run, iteration)


@app.command()
def evaluate(
    context: typer.Context,
    run: RunPath,
    iteration: Annotated[
        str | None,
        typer.Option(help="Players: numbers, `start`, `best`, with commas; benchmarks measure start,best by default."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="open-llm-leaderboard, big-bench, or mt-bench.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas: NAME, or NAME:FEWSHOTS.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many examples (questions) of each task.")] = None,
    task_data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE.jsonl: a task's examples. NAME:fewshot=FILE.jsonl: its few-shots."),
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder with task YAML files of your own.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put a task's prompts into the player's chat template.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a task that run at once.")] = 8,
    questions: Annotated[Path | None, typer.Option(help="MT-Bench's question.jsonl.")] = None,
    references: Annotated[Path | None, typer.Option(help="MT-Bench's reference answers, a .jsonl file.")] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint; its key comes from SPINLM_JUDGE_KEY.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Name of the judge's model.")] = None,
    judge_prompts: Annotated[Path | None, typer.Option(help="MT-Bench's judge_prompts.jsonl, or your own.")] = None,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Longest reply of the judge.")] = 2048,
    judge_parallel: Annotated[int, typer.Option(min=1, help="Requests to the judge at once.")] = 4,
    judge_timeout: Annotated[float, typer.Option(min=1, help="Seconds until the judge has to have replied.")] = 300,
    judge_options: Annotated[
        str | None, typer.Option(help="JSON: more fields of a request to the judge; null leaves one out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="MT-Bench: longest answer of a player.")] = 1024,
    pairwise: Annotated[bool, typer.Option("--pairwise", help="MT-Bench: players against the first one.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure players. On the held-out prompts, or with --suite or --tasks on benchmarks."""
    _refuse_unread(context, "mt-bench" if suite == "mt-bench" else "harness" if suite or tasks else "held-out")
    if suite is None and tasks is None:
        if iteration is None or not iteration.isdecimal():
            raise RunError("--iteration: name the number of one iteration, or a benchmark with --suite or --tasks")
        _stage("evaluate", run, int(iteration))
        return
    from spinlm.evals import scores
    from spinlm.export.player import which_player
    from spinlm.utils.signals import graceful_shutdown

    folder, loaded = _open_run(run)
    names = (iteration or "start,best").split(",")
    players = list(dict.fromkeys(which_player(folder, name.strip()) for name in names))
    remarks: list[str] = []
    with folder.locked(), graceful_shutdown():
        if suite == "mt-bench":
            from spinlm.evals.mt_bench import games
            from spinlm.evals.mt_bench.bench import mt_bench
            from spinlm.evals.mt_bench.judge import Judge, read_options

            asking: dict[str, Any] = {"max_tokens": judge_tokens, "parallel": judge_parallel, "timeout": judge_timeout}
            asking["options"] = read_options(judge_options)
            judge = Judge.of(judge_url, judge_model, judge_prompts, **asking)
            remarks = mt_bench(
                *(loaded, folder, players, judge, questions, references),
                limit=limit,
                pairwise=pairwise,
                max_new_tokens=max_new_tokens,
            )
            suite = games.SUITE if pairwise else suite
        else:
            from spinlm.evals.lm_harness.measure import harness

            harness(
                loaded,
                folder,
                players,
                suite,
                tasks,
                limit=limit,
                data=task_data or (),
                folder=task_folder,
                chat_template=apply_chat_template,
                batch_size=batch_size,
            )
    out = console(200)
    out.print(scores.table(folder, players, suite or "tasks"))
    for remark in remarks:
        out.print(printable(remark))


_READ_BY = {
    "mt-bench": ("questions", "references", "max_new_tokens", "pairwise", "limit"),
    "harness": ("tasks", "task_data", "task_folder", "apply_chat_template", "batch_size", "limit"),
    "held-out": (),
}


def _refuse_unread(context: typer.Context, what: str) -> None:
    """Refuse an option of another kind of measurement, which would change nothing."""
    for name in context.params:
        given = context.get_parameter_source(name)
        mine = name in ("run", "iteration", "suite", "quiet", *_READ_BY[what]) or (
            what == "mt-bench" and "judge" in name
        )
        if not mine and given is not None and given.name == "COMMANDLINE":
            where = {
                "mt-bench": "MT-Bench",
                "harness": "a task of lm-evaluation-harness",
                "held-out": "held-out prompts",
            }
            raise RunError(f"--{name.replace('_', '-')} has no meaning for {where[what]}. Leave it out")


@app.command()
def export(
    run: RunPath,
    to: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    iteration: Annotated[
        str | None, typer.Option(help="A number, `start`, or `best` (the default); for pairs the newest.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the model card; the default is the base model's.")
    ] = None,
    pairs: Annotated[
        Literal["trl", "llama-factory"] | None,
        typer.Option(help="Not a player but the pairs of an iteration, for another trainer.", show_default=False),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result, too; a new repository is private.")
    ] = None,
) -> None:
    """Take a player out of a run. As an adapter for PEFT or a whole model, with a model card; or the run's pairs."""
    from spinlm.export.pairs import export_pairs
    from spinlm.export.player import export as export_player
    from spinlm.export.player import push, which_player

    folder, recipe = _open_run(run)
    if pairs is not None:
        if merge or licence:
            raise RunError("--merge and --license have no meaning for --pairs. Leave them out")
        if iteration is not None and not iteration.isdecimal():
            raise RunError(f"--iteration {iteration}: pairs are those of an iteration: give its number")
        written = export_pairs(recipe, folder, None if iteration is None else int(iteration), to, pairs)
        print(f"wrote {to} ({written})")
    else:
        chosen = which_player(folder, iteration or "best")
        export_player(recipe, folder, chosen, to, merge=merge, licence=licence)
        beaten = "; no iteration beat the start" if iteration in (None, "best") and chosen == START else ""
        print(f"wrote {to} ({folder.iteration(chosen).name}{beaten})")
    if push_to_hub:
        print(f"pushed to {push(to, push_to_hub, recipe, data=pairs is not None)}")


@app.command()
def status(run: RunPath, against: RunComparison = None, as_json: AsJson = False) -> None:
    """Show how far a run has come, and its players."""
    from spinlm.report import compare, summary
    from spinlm.report.status import failure, run_status, stage_progress

    folder, _ = _open_run(run)
    if as_json:
        _print_status(folder, against)
        return
    out = console(100)
    where = run_status(folder)
    out.print(str(where))
    if told := stage_progress(folder, where):
        out.print(told)
    if failed := failure(folder):
        out.print(printable(f"The last attempt ended with: {failed}"))
    if summary.rows(folder):
        out.print(summary.table(folder, out.width))
    out.print(summary.verdict(folder))
    if against is not None:
        out.print(printable(str(compare.compare_runs(folder, RunDir(against)))))


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with run folders in it.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from rich.box import SIMPLE
    from rich.table import Table

    from spinlm.report.status import find_runs, status_of_all

    found = status_of_all(find_runs(folder))
    if as_json:
        for one in found:
            print(json.dumps(one))
        return
    if not found:
        print(f"no runs in {folder}")
        return
    grid = Table("run", "state", "players", "best", "outcome", box=SIMPLE, pad_edge=False)
    for one in found:
        where = "" if one["stage"] is None else f", {stage_label((one['stage'], one['iteration']))}"
        best = "–" if one["best"] is None else player_name(one["best"])
        outcome = one["verdict"] if one["state"] == "damaged" else one["outcome"] or "–"
        values = Path(one["run"]).name, one["state"] + where, str(len(one["players"])), best, outcome
        grid.add_row(*map(printable, values))
    console(160).print(grid)


@app.command()
def report(
    run: RunPath,
    to: Annotated[
        Path | None, typer.Option(help="File to write; the default is report.html in the run folder.")
    ] = None,
    against: RunComparison = None,
) -> None:
    """Write a run as one HTML page. Charts, answers side by side, times; also of a run that is under way or failed."""
    from spinlm.report.page import write_report
    from spinlm.report.summary import rows

    folder = RunDir(run)
    print(f"wrote {write_report(folder, to, other=None if against is None else RunDir(against))}")
    if not rows(folder):
        print("No player has been measured yet: the page shows the recipe, and what there is so far.")


@app.command()
def chat(
    run: RunPath,
    iterations: Annotated[
        str, typer.Option("--iterations", "--iteration", help="Players to ask: numbers, `start`, `best`.")
    ] = "start,best",
    prompt: Annotated[str | None, typer.Option(help="Ask this and exit; without it, ask on the terminal.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, as your data has it.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Put the same prompt to several players of a run, side by side."""
    from rich.console import Console

    from spinlm.chat import ask, put, who
    from spinlm.data.renderer import RowError

    folder, recipe = _open_run(run)
    heads, remark = who(folder, iterations)
    if remark:
        print(f"({remark})")
    before = [{"role": "system", "content": system}] if system else []
    if prompt is None and sys.stdin.isatty():
        print("(each prompt is a conversation of its own; Ctrl-D ends)")
    while True:
        try:
            text = prompt if prompt is not None else input("you> ")
        except EOFError:
            return
        if prompt is None and not text.strip():
            continue
        asked = [*before, {"role": "user", "content": text}]
        answer = partial(ask, recipe, folder, list(heads), asked, temperature=temperature, seed=recipe.seed)
        try:
            put(Console(), list(heads.values()), answer)
        except RowError as error:
            if prompt is not None:
                raise SpinError(f"this prompt cannot be used: {error}") from error
            print(f"this prompt cannot be used: {error}")
            continue
        if prompt is not None:
            return


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe that runs as it is. Example data go beside it: replace model and data by yours."""
    from spinlm.cli.starter import write_template

    if path.exists():
        raise SpinError(f"{path}: already there; name another file")
    data = write_template(path)
    beside = f" and {data}, example data" if data else ""
    print(f"wrote {path}{beside}. Set model.path and data.path to yours, then: spinlm plan {path}")


def main() -> None:
    """Entry point: errors meant for the user are shown without a traceback, with their exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # a line for every retry otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # spinlm shows its own progress
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about each other
    for stream in (sys.stdout, sys.stderr):  # one that is not UTF-8 shows a ? rather than nothing at all
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    alone = os.environ.get("RANK", "0") == "0"  # of several processes the first tells how it goes
    logging.basicConfig(format="%(message)s", level=logging.INFO if alone else logging.ERROR, stream=sys.stderr)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except PeerError as error:  # which has said why
        sys.exit(error.exit_code)
    except SpinError as error:
        print(f"spinlm: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"spinlm: out of memory ({(str(error) or 'MemoryError').splitlines()[0]}).", end=" ", file=sys.stderr)
        print("Lower train.tokens_per_micro_batch or opponent.batch_size, or set", end=" ", file=sys.stderr)
        print("train.gradient_checkpointing: true, then run the same command again: it goes on", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        where = error.filename or "the run folder"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what, remedy = ("the disk is full", "Make room") if full else ("cannot write there", "Put that right")
        print(f"spinlm: {where}: {what} ({error.strerror}). {remedy} or", end=" ", file=sys.stderr)
        print(
            "choose another --run-dir, then run the same command again: nothing that was done is lost", file=sys.stderr
        )
        sys.exit(2)


def _run_folder(recipe: Path, run_dir: Path | None) -> Path:
    return run_dir or Path("runs") / recipe.stem


def _load(recipe: Path, overrides: list[str] | None) -> "Recipe":
    from spinlm.recipe.load import load_recipe

    return load_recipe(recipe, overrides or ())


def _open_run(path: Path) -> tuple[RunDir, "Recipe"]:
    from spinlm.recipe.load import parse_recipe
    from spinlm.rundir.provenance import read_recipe

    run = RunDir(path)
    return run, parse_recipe(read_recipe(run), str(run.recipe))


def _stage(name: str, path: Path, iteration: int) -> None:
    import importlib

    from spinlm.distributed import processes
    from spinlm.utils.signals import graceful_shutdown

    run, recipe = _open_run(path)
    if not 0 <= iteration < recipe.selfplay.iterations:
        raise RunError(f"--iteration {iteration}: this run has iterations 0 to {recipe.selfplay.iterations - 1}")
    stage = getattr(importlib.import_module(f"spinlm.stages.{name}"), name)
    with graceful_shutdown(), processes.process_group(), contextlib.ExitStack() as held:
        processes.on_rank_zero(held.enter_context, run.locked())
        done = processes.on_rank_zero(run.done, name, iteration)
        processes.on_rank_zero(run.error_file.unlink, missing_ok=True)
        stage(recipe, run, iteration)
        if processes.is_main_process():
            print(f"{name} of iteration {iteration}: " + ("already complete" if done else "complete"))


def _called() -> str:
    """How this command line was called."""
    return "python -m spinlm" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _print_status(run: RunDir, other: Path | None = None) -> None:
    from spinlm.report import compare
    from spinlm.report.status import status

    compared = {}
    if other is not None:
        found = compare.compare_runs(run, RunDir(other))
        compared = {"against": asdict(found) | {"result": found.result, "said": str(found)}}
    print(json.dumps(status(run) | compared))


def _print_result(run: RunDir) -> None:
    from spinlm.report.summary import is_control, side_by_side, start_from, system_prompt, table, verdict

    out = console(100)
    for prompt, real, answers in side_by_side(run, prompts=3):
        out.print()
        for name, text in (("prompt", prompt), ("real", real), *answers):
            out.print(f"{name:<11} " + printable(text).replace("\n", f"\n{'':12}"))
    out.print(table(run, out.width))
    out.print(verdict(run))
    asked = system_prompt(run)  # without it, a prompt would be another task
    system = f" --system {shlex.quote(asked)}" if asked else ""
    spinlm = "spinlm" if shutil.which("spinlm") else _called()
    folder, recipe, other = (shlex.quote(f"{run.root}{end}") for end in ("", "/recipe.yaml", "-control"))
    control = f"run {recipe} 'objective={{name: sft}}' --start-from {folder} --run-dir {other}"
    commands = {
        control: "does as much fine-tuning gain as much?",
        f"report {folder}": "charts, and all answers side by side, on one page",
        f"chat {folder}{system}": "the same prompt to the start and to the best player",
        f"export {folder} --merge --to my-model": "take the best player away",
        "init": "a recipe for your own model and data",
    }
    if is_control(run):
        del commands[control]
        source = start_from(run)
        if source and RunDir(Path(source)).recipe.exists():
            near = Path(source).relative_to(Path.cwd()) if Path(source).is_relative_to(Path.cwd()) else source
            compare = f"status {shlex.quote(str(near))} --against {folder}"
            commands = {compare: "how that run and this one stand against each other", **commands}
    best = START if (found := run.best()) is None else found
    out.print(printable(f"\nThe run is in {run.root}; the best player is {run.player(best)}. Next:"))
    for command, purpose in commands.items():
        out.print(f"  {spinlm} {printable(command)}    # {purpose}", soft_wrap=True)
