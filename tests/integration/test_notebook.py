"""The notebook in a real kernel: with a tiny model instead of SmolLM2, and interrupted once."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from model_server import ModelServer, listen
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from runs import World

from spinlm.utils.atomic import read_json

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
STOPPED = "stopped; run the same command again to continue"


def interrupt_when(path: Path, pid: int) -> threading.Thread:
    """Interrupt a kernel, as its stop button does, when a file exists."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        os.kill(pid, signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def text_of(cell: Any) -> str:
    """Return what a cell shows as plain text."""
    return "".join(
        output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"] for output in cell.outputs
    )


def test_notebook(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server generates the responses: its client runs in the event loop of the kernel."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    served, run = ModelServer("vllm", str(world.model)), tmp_path / "run"
    with listen(served.post, served.get) as url:
        server = f"opponent.server={{api: vllm, urls: ['{url}/v1']}}"
        tiny = [f"model.path={world.model}", "opponent.max_new_tokens=6", "sft.batch_size=4"]
        cells["parameters"].source += f"""
run_dir = {str(run)!r}
changes += {[*tiny, "opponent.engine=server", server]}
import os, pathlib
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))"""
        client = NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        code = [(number, cell) for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        with client.setup_kernel():
            for number, cell in code:
                if cell.id == "run":
                    thread = interrupt_when(run / "train_log.jsonl", int((tmp_path / "pid").read_text()))
                    with pytest.raises(CellExecutionError, match=STOPPED):
                        client.execute_cell(cell, number)
                    thread.join()
                    assert not (run / "start" / "eval.json").exists()
                    assert cell.outputs[-1]["traceback"] == [f"StoppedError: {STOPPED}"]
                    cell.outputs.clear()
                client.execute_cell(cell, number)

    shown = {name: text_of(cell) for name, cell in cells.items() if cell.cell_type == "code"}
    assert not any(re.search(r"[\x1b\r]", text) for text in shown.values())
    assert not any(output.get("name") == "stderr" for _, cell in code for output in cell.outputs)
    progress = [output for output in cells["run"].outputs if output["output_type"] == "display_data"]
    assert any(re.match(r"iteration 0: train 2/2, ", output["data"]["text/plain"]) for output in progress)
    assert shown["run"].count("loading the model") == 1  # each message once
    assert served.loaded  # the server had the opponent
    table = cells["table"].outputs[0]["data"]["text/html"]
    assert re.findall(r"<th>(start|iteration \d)</th>", table) == ["start", "iteration 0"]
    numbers = {float(number) for number in re.findall(r"<td>([\d.]+)</td>", table)}
    for player in ("start", "iteration-0"):
        assert round(read_json(run / player / "eval.json")["heldout_nll"], 3) in numbers
    assert shown["verdict"].startswith("Self-play ")
    assert "<iframe" in cells["report"].outputs[0]["data"]["text/html"] and (run / "report.html").exists()
    page = cells["respond"].outputs[-1]["data"]["text/html"]
    assert all(word in page for word in ("call ana lopez", ">start</th>", ">iteration 0</th>"))
