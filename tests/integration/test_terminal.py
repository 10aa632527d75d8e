"""The output of commands: on a terminal, in a log, and for a program."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
from runs import read_rows, rewrite_markers, write_rows

from spinlm.rundir.layout import RunDir
from spinlm.utils.console import printable

ESCAPE = "\x1b"


def on_a_terminal(*arguments, folder, columns=100):
    """Run a command on a terminal; return its output and its exit code."""
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30"}
    command = [sys.executable, "-m", "spinlm", *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        written = b""
        try:
            while chunk := os.read(main, 1 << 16):
                written += chunk
        except OSError:  # the other end is closed
            pass
    os.close(main)
    return written.decode(), process.returncode


def test_a_run_on_a_terminal_shows_bars_with_rate_loss_and_margin(world, rewound):
    output, code = on_a_terminal("run", world.recipe, "--run-dir", rewound(1), folder=world.folder)
    assert code == 0
    for label in ("generate", "reference log-probabilities", "train"):
        assert f"iteration 1: {label}" in output
    assert ESCAPE in output and "tokens/s, loss 0." in output and ", margin " in output
    assert "0:00:0" in output  # the remaining time


def test_a_run_in_a_log_writes_no_control_characters(world, rewound, cli):
    done = cli("run", world.recipe, "--run-dir", rewound(1), folder=world.folder)
    assert "Next:" in done.out and "1: " in done.err
    assert ESCAPE not in done.out + done.err
    assert "\r" not in done.out + done.err


def test_a_quiet_run_prints_only_its_result(world, rewound, cli):
    done = cli("run", world.recipe, "--run-dir", rewound(1), "--quiet", folder=world.folder)
    assert "Next:" in done.out
    assert done.err == ""


def test_a_run_for_a_program(world, rewound, cli):
    run = rewound(1)
    data = json.loads(cli("run", world.recipe, "--run-dir", run, "--json", folder=world.folder).out)
    assert data["state"] == "finished" and len(data["players"]) == 3
    assert data == json.loads(cli("status", run, "--json", folder=world.folder).out)


def test_a_plan_for_a_program(world, cli, tmp_path):
    data = json.loads(cli("plan", world.recipe, "--json", folder=tmp_path).out)
    assert [cost["iteration"] for cost in data["iterations"]] == [-1, 0, 1]
    assert data["iterations"][2]["pairs"] == 2 * data["iterations"][1]["pairs"] > 0
    assert data["devices"][0]["memory"]["training"] > 0 and data["devices"][0]["hours"][1]["train"] > 0
    write_rows(tmp_path / "odd.jsonl", [{"prompt": "p", "respons": "r"}] * 40)
    odd = cli("plan", world.recipe, f"data.path={tmp_path / 'odd.jsonl'}", "--json", folder=tmp_path, code=2)
    assert "cannot tell which columns hold the prompt and the response" in json.loads(odd.out)["refusals"][0]
    missing = cli("plan", world.recipe, "data.path=none.jsonl", "--json", folder=tmp_path, code=2)
    assert "none.jsonl: no such file" in json.loads(missing.out)["refusals"][0]


def test_the_recipe_of_init_runs(world, cli, tmp_path):
    """The model is tiny and the sizes are small."""
    cli("init", folder=tmp_path)
    small = ("data.heldout=4", "data.prompts=8", "opponent.max_new_tokens=8", "selfplay.iterations=1")
    model = f"model.path={world.model}"
    done = cli("run", "recipe.yaml", model, *small, "lora.r=2", folder=tmp_path)
    assert "Next:" in done.out
    assert (tmp_path / "runs" / "recipe" / ".spinlm" / "iteration-0" / "promote.done").exists()


def test_init_leaves_data_alone(cli, tmp_path):
    (tmp_path / "data.jsonl").write_text("mine")
    assert cli("init", "other.yaml", folder=tmp_path).out.startswith("wrote other.yaml. Set ")
    assert (tmp_path / "data.jsonl").read_text() == "mine"
    shutil.rmtree(tmp_path)


ODD = "{a:100:b} :smile: [red]not red[/red] \x1b[31m\x9b31m"


def test_text_is_shown_literally(reference, cli, tmp_path):
    """Text of models and names of folders: no emoji codes, no markup, no control characters."""
    run = shutil.copytree(reference, tmp_path / "runs" / "lr[red]1e-5\x1b[31m", symlinks=True)
    for path in run.glob("*/heldout_greedy.jsonl"):
        write_rows(path, [row | {"text": ODD} for row in read_rows(path)])
    rewrite_markers(run)
    shown = printable(ODD)
    from spinlm.cli.run import print_result

    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_result(RunDir(run))
    assert shown in " ".join(out.getvalue().split()) and ESCAPE not in out.getvalue()
    listed = cli("list", folder=tmp_path).out
    assert "lr[red]1e-5\\x1b[31m" in listed and ESCAPE not in listed


def test_a_damaged_run_hides_no_other(reference, cli, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(reference, tmp_path / "runs" / name, symlinks=True)
    (tmp_path / "runs" / "a" / "iteration-1" / "eval.json").unlink()
    (tmp_path / "runs" / "b" / "recipe.yaml").write_text("{}")
    data = [json.loads(line) for line in cli("list", "--json", folder=tmp_path).out.splitlines()]
    assert [run["state"] for run in data] == ["damaged", "damaged", "finished"]
    assert "runs/a/iteration-1/eval.json: is missing" in data[0]["verdict"]
    assert "damaged" in cli("list", folder=tmp_path).out


def test_forced_colors_in_a_log_are_no_bars(world, rewound, cli):
    done = cli("run", world.recipe, "--run-dir", rewound(1), folder=world.folder, FORCE_COLOR="1")
    assert ESCAPE not in done.err


def test_an_output_that_is_not_utf8(reference, tmp_path):
    command = [sys.executable, "-m", "spinlm", "status", str(reference)]
    for more in ([], ["--json"]):
        done = subprocess.run(
            [*command, *more], cwd=tmp_path, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
        )
        assert done.returncode == 0 and done.stdout.isascii()


@pytest.mark.parametrize(("columns", "shown"), [(100, 8), (80, 8)])
def test_no_number_is_cut_on_a_narrow_terminal(reference, tmp_path, columns, shown):
    output, code = on_a_terminal("status", reference, folder=tmp_path, columns=columns)
    assert code == 0 and "…" not in output
    (row,) = re.findall(r"iteration 1 +(?:\(best\) +)?([-+.%–0-9 ]+)", re.sub(r"\x1b\[[0-9;]*m", "", output))[:1]
    score = json.loads((reference / "iteration-1" / "eval.json").read_text())["task_score"]
    assert row.split()[0] == f"{score:.3f}" and len(row.split()) == shown - 1
