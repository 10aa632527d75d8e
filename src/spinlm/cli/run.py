"""Commands that play a recipe: the whole run, a preview of it, or one stage."""

import importlib
import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spinlm.cli.inspect import print_status
from spinlm.cli.options import (
    AsJson,
    Iteration,
    Overrides,
    Quiet,
    RecipePath,
    RunDirOption,
    RunPath,
    load_recipe_file,
    read_run,
    run_folder,
)
from spinlm.errors import RunError
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START
from spinlm.utils.console import console, printable


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the results in the folder first.")] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(help="Take the examples, the start and, with equal settings, the first responses from this run."),
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as `spinlm status --json` does.")] = False,
) -> None:
    """Run self-play, or continue an interrupted run."""
    loaded = load_recipe_file(recipe, overrides)
    path = run_folder(recipe, run_dir)

    from spinlm import selfplay
    from spinlm.distributed.processes import is_main_process

    folder = selfplay.run(loaded, path, overwrite=overwrite, start_from=start_from)
    if is_main_process():
        print_status(folder) if as_json else print_result(folder)


def extrapolate(
    run: RunPath,
    factor: Annotated[
        float, typer.Option(help="Go this far from the start: 1 is the player, more is beyond it.", show_default=False)
    ],
    run_dir: Annotated[Path, typer.Option(help="Make this run folder.", show_default=False)],
    iteration: Annotated[
        int | None,
        typer.Option(min=0, help="Choose the player of this iteration. The default is the last one not collapsed."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Extrapolate a player: a control that costs no training.

    Makes a run with the weights θ_0 + factor (θ − θ_0), and measures it as any run (ExPO, arXiv 2404.16792).
    """
    source, recipe = read_run(run)

    from spinlm import selfplay
    from spinlm.stages.extrapolate import extrapolation_recipe

    loaded = extrapolation_recipe(source, recipe, factor, iteration)
    print_result(selfplay.run(loaded, run_dir, start_from=run))


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    processes: Annotated[
        int, typer.Option(min=1, envvar="WORLD_SIZE", help="Plan for this number of processes, one on each device.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Estimate steps, memory and time of a run.

    Needs no model weights. Of a hub model it reads config.json.
    """
    from rich.console import Console

    from spinlm.plan import make_plan, render

    loaded = load_recipe_file(recipe, overrides)
    estimate = make_plan(loaded, RunDir(run_folder(recipe, run_dir)), processes)
    if as_json:
        print(json.dumps(asdict(estimate)))
    else:
        Console().print(render(estimate))
    if estimate.refusals:
        raise typer.Exit(RunError.exit_code)


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Check with the examples and the starting player of this run.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Test a recipe on a few prompts.

    Checks the model, the chat template, the loss and the memory with the code of a run.
    """
    loaded = load_recipe_file(recipe, overrides)

    from spinlm.check import check as check_recipe

    for line in check_recipe(loaded, start_from):
        print(printable(line), flush=True)


def generate(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Generate the responses of the opponent."""
    run_stage("generate", run, iteration)


def reference_logprobs(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Compute log-probabilities of the opponent.

    Scores the real and the generated responses, and writes the pairs for training.
    """
    run_stage("reference_logprobs", run, iteration)


def regime(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Compare the gradient with that of fine-tuning."""
    run_stage("regime", run, iteration)


def train(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Train the main player."""
    run_stage("train", run, iteration)


def evaluate(run: RunPath, iteration: Iteration, quiet: Quiet = False) -> None:
    """Measure a player on the held-out prompts."""
    run_stage("evaluate", run, iteration)


def run_stage(name: str, path: Path, iteration: int) -> None:
    """Run one stage of one iteration, unless the stage is complete.

    Raises:
        RunError: the run has no such iteration, or an earlier stage is not complete.
    """
    from spinlm.distributed import processes
    from spinlm.model.run import open_run

    folder, recipe = read_run(path)
    if not 0 <= iteration < recipe.selfplay.iterations:
        raise RunError(f"--iteration {iteration}: this run has iterations 0 to {recipe.selfplay.iterations - 1}")
    module = importlib.import_module(f"spinlm.stages.{name}")
    with open_run(recipe, folder) as run:
        done = processes.on_rank_zero(folder.done, name, iteration)
        getattr(module, name)(run, iteration)
        if processes.is_main_process():
            print(f"{name} of iteration {iteration}: " + ("already complete" if done else "complete"))


def print_result(folder: RunDir) -> None:
    """Print example responses, the table of players, the verdict, and commands to try next."""
    from spinlm.report.run_data import run_data
    from spinlm.report.summary import table, verdict

    out = console(100)
    for shown in run_data(folder).side_by_side(3, all_players=False):
        out.print()
        responses = ((player, text) for player, text, _ in shown.responses)
        for name, text in (("prompt", shown.messages[-1]["content"]), ("real", shown.real), *responses):
            out.print(f"{name:<11} " + printable(text).replace("\n", f"\n{'':12}"))
    out.print(table(folder))
    out.print(verdict(folder))
    best = START if (chosen := folder.best()) is None else chosen
    out.print(printable(f"\nThe run is in {folder.root}; the best player is {folder.player(best)}. Next:"))
    program = "spinlm" if shutil.which("spinlm") else _program()
    for command, purpose in _next_commands(folder).items():
        out.print(f"  {program} {printable(command)}    # {purpose}", soft_wrap=True)


def _program() -> str:
    """Return how to start spinlm in a shell that does not find it by name, such as one without the environment."""
    script, options = Path(sys.executable).with_name("spinlm"), []
    if not script.exists():
        script, options = Path(sys.executable), ["-m", "spinlm"]
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join([str(script), *options])


def _next_commands(folder: RunDir) -> dict[str, str]:
    """Return commands that make sense after a run, each with its purpose."""
    from spinlm.report.run_data import run_data
    from spinlm.report.summary import is_control, start_from
    from spinlm.rundir.provenance import read_recipe

    prompt = run_data(folder).system_prompt  # `chat` needs the system prompt of the data
    system = f" --system {shlex.quote(prompt)}" if prompt else ""
    run, recipe, control = (shlex.quote(f"{folder.root}{end}") for end in ("", "/recipe.yaml", "-control"))
    commands = {
        f"report {run}": "write charts and all responses to one page",
        f"chat {run}{system}": "send a prompt to the start and to the best player",
        f"export {run} --merge --output my-model": "save the best player as a model",
        "init": "write a recipe for your own model and data",
    }
    if not is_control(folder):
        sft = f"run {recipe} 'objective={{name: sft}}' --start-from {run} --run-dir {control}"
        return {sft: "train a control: does fine-tuning alone gain as much?", **commands}
    source = start_from(folder)
    if source and RunDir(Path(source)).is_run():
        path = Path(source).relative_to(Path.cwd()) if Path(source).is_relative_to(Path.cwd()) else source
        objective = read_recipe(folder)["objective"]
        compare = f"status {shlex.quote(str(path))} --baseline {run}"
        if objective["name"] == "extrapolate":  # the only player of this run comes from any iteration of the other
            player = shlex.quote(f"{path}:{objective['iteration']}")
            compare = f"compare {player} {run}"
        return {compare: "compare that run with this one", **commands}
    return commands
