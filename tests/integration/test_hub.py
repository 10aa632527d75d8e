"""Models and data sets of the hub, through the real client and a stand-in for the hub."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from commands import Cli, serving
from hub import TOKEN, Hub
from huggingface_hub import HfApi
from pyarrow import parquet
from runs import read_rows
from safetensors.torch import load_file, save_file

from models import save_tiny_model
from spinlm.errors import DataError, ModelError
from spinlm.recipe.load import as_yaml
from spinlm.utils import hub as client
from spinlm.utils.hub import Repository

CARD = b"""---
configs:
- {config_name: main, data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]}
- {config_name: other, data_files: [{split: train, path: other/train-*}]}
---
"""


SFT = "sft={epochs: 3, learning_rate: 2e-2, batch_size: 4}"


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def rows(answer: str, count: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n}?", "response": f"{answer} {n % 4}"} for n in range(count)]


def data_set(answer: str = "It is") -> dict[str, bytes]:
    """A data set with two subsets."""
    files = {"main/train": rows(answer), "main/test": rows("test", 12), "other/train": rows("other", 12)}
    return {"README.md": CARD} | {f"{at}-00000-of-00001.parquet": as_parquet(these) for at, these in files.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model."""
    return save_tiny_model(tmp_path_factory.mktemp("hub") / "model", "mistral", "zephyr", sliding_window=None)


@pytest.fixture(scope="module")
def hub(folder) -> Hub:
    hub = Hub()
    hub.commit("models/o/model", folder)
    hub.commit("datasets/o/data", data_set())
    return hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home) -> Iterator[Any]:
    with serving(**hub.environment(home)) as ask:
        yield ask


@pytest.fixture
def spinlm(online, hub, tmp_path) -> Cli:
    """Run commands that ask the stand-in. The cache stays from test to test: use other names for a cold one."""
    hub.log.clear()
    hub.faults.clear()
    return Cli(online, tmp_path / "streams")


@pytest.fixture
def recipe(tmp_path) -> Callable[..., Path]:
    """Write a recipe. Sections are merged with those of the smallest run."""

    def write(**sections: dict[str, Any]) -> Path:
        values: dict[str, dict[str, Any]] = {
            "model": {"path": "o/model"},
            "lora": {"r": 2},
            "data": {"path": "o/data", "subset": "main", "prompts": 8, "heldout": 4},
            "opponent": {"max_new_tokens": 4, "batch_size": 8},
            "selfplay": {"iterations": 1},
            "train": {"epochs": 1, "batch_size": 4, "max_length": 64, "optimizer": "adamw"},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        path = tmp_path / "recipe.yaml"
        path.write_text(as_yaml(values))
        return path

    return write


def play(spinlm: Cli, recipe: Path, *arguments: str | Path, **environment: str) -> Path:
    """Run a recipe to its end, and return the run folder."""
    spinlm("run", recipe, *arguments, folder=recipe.parent, **environment)
    return recipe.parent / "runs" / "recipe"


def inputs(run: Path) -> dict[str, Any]:
    return json.loads((run / "provenance.json").read_text())["inputs"]


def refused(spinlm: Cli, recipe: Path, command: str = "run", **environment: str) -> str:
    message = spinlm(command, recipe, folder=recipe.parent, code=2, **environment).message
    assert "\n" not in message
    return message


def test_a_run_keeps_the_commits_it_began_with(spinlm, recipe, hub, folder, tmp_path):
    """The branches move after the start: the run does not ask again, and continues with the same weights and data."""
    first = hub.commit("models/o/moves", folder), hub.commit("datasets/o/moves", data_set())
    written = recipe(model={"path": "o/moves"}, data={"path": "o/moves"})
    run = play(spinlm, written)
    assert inputs(run)["model"] == {"id": "o/moves", "commit": first[0]}
    assert inputs(run)["data"] == {"id": "o/moves", "subset": "main", "split": "train", "commit": first[1]}
    assert json.loads((run / "iteration-0/player/adapter_config.json").read_text())["revision"] == first[0]

    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, tmp_path / "zero", {"format": "pt"})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.commit("models/o/moves", files | {"model.safetensors": (tmp_path / "zero").read_bytes()})
    hub.commit("datasets/o/moves", data_set("Now it is"))
    hub.log.clear()
    play(spinlm, written, "selfplay.iterations=2")
    assert inputs(run)["model"]["commit"] == first[0] and (run / "iteration-1/player").is_dir()
    spinlm("export", run, "--iteration", "start", "--merge", "--output", "merged", folder=tmp_path)
    assert hub.log == []
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged.items())

    new = play(spinlm, written, "--overwrite")
    assert inputs(new)["model"]["commit"] != first[0]
    assert read_rows(new / "examples/train.jsonl")[0]["response"].startswith("Now it is")


def test_how_often_a_run_asks_the_hub(spinlm, recipe, hub):
    """A new run with a warm cache asks for both commits, and `datasets` for the files; a finished one asks nothing."""
    written = recipe()
    play(spinlm, written)
    hub.log.clear()
    play(spinlm, written, "--overwrite")
    commits = ["GET /api/datasets/o/data", "GET /api/models/o/model"]
    assert hub.log[:2] == commits and not any("o/model" in line for line in hub.log[2:])
    assert len(hub.log) <= 8, hub.log  # `datasets` sends six
    hub.log.clear()
    play(spinlm, written)
    assert hub.log == []


def test_without_a_network(spinlm, recipe, hub, home, tmp_path):
    """A new run needs the cache alone, whether HF_HUB_OFFLINE is set or the hub is unreachable."""
    run = play(spinlm, recipe())
    with serving(**hub.environment(home, HF_HUB_OFFLINE="1")) as ask:
        offline = Cli(ask, tmp_path / "offline")
        hub.log.clear()
        play(offline, recipe(), "--run-dir", "new")
        for name in ("examples/train.jsonl", "iteration-0/heldout_greedy.jsonl"):
            assert (tmp_path / "new" / name).read_bytes() == (run / name).read_bytes()
        assert inputs(tmp_path / "new") == inputs(run)
        for section, option in (("model", ""), ("data", " --repo-type dataset")):
            message = refused(offline, recipe(**{section: {"path": "o/none"}}), "check")
            assert message.startswith("o/none: HF_HUB_OFFLINE is set") and f"`hf download o/none{option}`" in message
        assert hub.log == []
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("It is")))
    hub.stop()  # `datasets` then waits for 24 seconds, so the data are a file here
    try:
        local = {"path": "data.jsonl", "subset": None}
        play(spinlm, recipe(data=local), "--run-dir", "local")
        assert inputs(tmp_path / "local")["model"] == inputs(run)["model"]
        for section in ({"model": {"path": "o/none"}, "data": local}, {"data": {"path": "o/none"}}):
            message = refused(spinlm, recipe(**section), "check")
            assert message.startswith(f"o/none: the hub at {hub.url} does not answer, and the cache lacks this ")
    finally:
        hub.start()


def test_the_cache_is_not_taken_for_another_commit(spinlm, recipe, hub):
    """`datasets` reads its cache without looking at the revision."""
    old = hub.commit("datasets/o/twice", data_set("Old"))
    hub.commit("datasets/o/twice", data_set("New"))
    play(spinlm, recipe(data={"path": "o/twice"}))
    hub.fail("datasets/o/twice", times=10**6, status=503, headers={"Retry-After": "0"})
    message = refused(spinlm, recipe(data={"path": "o/twice", "revision": old}), "check")
    assert message.startswith("o/twice: ") and old in message


@pytest.mark.parametrize(
    ("sections", "token", "words"),
    [
        ({"model": {"path": "o/none"}}, "", "there is no folder and no model of the hub; model.path; hf auth login"),
        ({"data": {"path": "o/none"}}, "", "there is no folder and no data set of the hub; data.path"),
        ({"model": {"path": "o/private"}}, "", "there is no folder; private; hf auth login"),
        ({"model": {"revision": "v9"}}, "", "no revision v9. Correct model.revision; /o/model/commits/main"),
        ({"data": {"revision": "v9"}}, "", "no revision v9. Correct data.revision; /datasets/o/data/commits/main"),
        ({"model": {"path": "o/gated"}}, "", "this model is restricted; its terms; /o/gated, then; hf auth login"),
        ({"model": {"path": "o/gated"}}, "hf_other", "this model is restricted; HF_TOKEN"),
        ({"data": {"path": "o/gated"}}, "", "this data set is restricted; /datasets/o/gated"),
        ({"model": {"path": "o/gguf"}}, "", "no config.json; .gguf file; model.path"),
        ({"data": {"split": "trian"}}, "", "trian; train; test; data.split"),
        ({"data": {"subset": None}}, "", "several subsets. Set data.subset to one of: main, other"),
        ({"data": {"subset": "mian"}}, "", "no subset 'mian'. Set data.subset to one of: main, other"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_error_messages(spinlm, recipe, hub, folder, sections, token, words):
    if "models/o/gated" not in hub.repos:
        for name in ("gated", "private"):
            hub.commit(f"models/o/{name}", folder)
            hub.commit(f"datasets/o/{name}", data_set())
            for kind in ("models", "datasets"):
                setattr(hub.repos[f"{kind}/o/{name}"], name, True)
        hub.commit("models/o/gguf", {"README.md": b"", "model.Q4.gguf": b"GGUF"})
    message = refused(spinlm, recipe(**sections), HF_TOKEN=token)
    (section,) = sections.values()
    assert message.startswith(section.get("path", "o/")) and all(part in message for part in words.split("; ")), message
    assert len(message) < 300  # not the paragraphs of the client


def test_a_token_opens_gated_and_private_repositories(spinlm, recipe, hub, folder):
    for kind, files in (("models", folder), ("datasets", data_set())):
        hub.commit(f"{kind}/o/closed", files)
        hub.repos[f"{kind}/o/closed"].gated = hub.repos[f"{kind}/o/closed"].private = True
    run = play(spinlm, recipe(model={"path": "o/closed"}, data={"path": "o/closed"}), HF_TOKEN=TOKEN)
    assert TOKEN not in "".join(path.read_text(errors="ignore") for path in run.rglob("*") if path.is_file())


def test_faults_that_pass(spinlm, recipe, hub, folder):
    """The run is the same as without them. An optional file is no exception: it is not taken for missing."""
    hub.commit("models/o/shaky", folder)
    hub.commit("datasets/o/shaky", data_set())
    faults = [
        hub.fail("GET /api/models/o/shaky$", status=429, headers={"Retry-After": "1"}),
        hub.fail("HEAD /o/shaky/resolve/.*/chat_template.jinja", times=2, status=503),
        hub.fail("GET /o/shaky/resolve/.*/tokenizer.json", cut=1000),
        hub.fail("GET /o/shaky/resolve/.*/tokenizer_config.json", status=503),
        hub.fail("GET /api/datasets/o/shaky$", status=502),
        hub.fail("GET /blobs/.*", times=2, cut=100),  # the data
    ]
    run = play(spinlm, recipe(model={"path": "o/shaky"}, data={"path": "o/shaky"}))
    assert [fault.times for fault in faults] == [0] * len(faults)
    play(spinlm, recipe(), "--run-dir", "undisturbed")
    for name, key in (("examples/train.jsonl", "prompt_ids"), ("iteration-0/heldout_greedy.jsonl", "text")):
        first, second = (read_rows(folder / name) for folder in (run, run.parents[1] / "undisturbed"))
        assert [row[key] for row in first] == [row[key] for row in second]


def test_a_cut_download_of_weights(spinlm, recipe, hub, folder):
    """The client tries again by itself."""
    hub.commit("models/o/cut", folder)
    play(spinlm, recipe())  # now the data are in the cache
    fault = hub.fail("GET /blobs/", times=2, cut=(folder / "model.safetensors").stat().st_size // 2)
    run = play(spinlm, recipe(model={"path": "o/cut"}), "--run-dir", "cut")
    assert fault.times == 0 and run.is_dir()


def test_renamed_repositories(spinlm, recipe, hub):
    hub.renamed |= {"models/old/model": "models/o/model", "datasets/old/data": "datasets/o/data"}
    run = play(spinlm, recipe(model={"path": "old/model"}, data={"path": "old/data"}))
    assert inputs(run)["model"] == {"id": "old/model", "commit": hub.repos["models/o/model"].refs["main"]}
    assert inputs(run)["data"]["commit"] == hub.repos["datasets/o/data"].refs["main"]


def test_plan_and_check_ask_the_hub(spinlm, recipe, hub, folder):
    hub.commit("models/o/planned", folder, ref="v1")
    written = recipe(model={"path": "o/planned", "revision": "v1"})
    plan = json.loads(spinlm("plan", written, "--json", folder=folder).out)
    assert plan["parameters"] > 0 and "config.json" in plan["shape_source"]
    commit = hub.repos["models/o/planned"].refs["v1"]
    config = [f"{method} /o/planned/resolve/{commit}/config.json" for method in ("HEAD", "GET")]
    assert hub.log == ["GET /api/models/o/planned/revision/v1", *config]
    assert "Ready" in spinlm("check", written, folder=folder).out


def test_columns_of_many_kinds(spinlm, recipe, hub):
    """Text stays text, and images are not loaded."""
    part = [{"type": "text", "text": "p1"}]
    talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": "r"}] for p in ("p0", part, "p2", "p3")]
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "cover": datasets.Image()})
    values = {"messages": talks, "cover": [{"bytes": None, "path": f"{hub.url}/x.png"}] * 4}
    table = datasets.Dataset.from_dict(values, features=features).data.table
    described = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    parquet.write_table(table.replace_schema_metadata(described), file := io.BytesIO())
    hub.commit("datasets/o/kinds", {"data/train-00000-of-00001.parquet": file.getvalue()})
    small = {"path": "o/kinds", "subset": None, "prompts": None, "heldout": 2}
    run = play(spinlm, recipe(data=small, train={"batch_size": 2}))
    found = [row for split in ("train", "heldout") for row in read_rows(run / f"examples/{split}.jsonl")]
    assert sorted(row["messages"][0]["content"] for row in found) == ["p0", "p1", "p2", "p3"]
    assert found[0]["source"].startswith("o/kinds:") and not any("x.png" in line for line in hub.log)


@pytest.fixture(scope="module")
def finished(online, hub, tmp_path_factory) -> Path:
    """A run over a folder and a file of this machine, to push."""
    world = tmp_path_factory.mktemp("finished")
    save_tiny_model(world / "model", "mistral", "zephyr", sliding_window=None)
    (world / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("It is")))
    values = "lora={r: 2}", "data.prompts=8", "data.heldout=4", "opponent.max_new_tokens=8", "selfplay.iterations=1"
    (world / "recipe.yaml").write_text("model: {path: model}\ndata: {path: data.jsonl}\n")
    train = "train={epochs: 1, batch_size: 4, max_length: 64, optimizer: adamw}"
    Cli(online, world / "streams")("run", "recipe.yaml", *values, train, SFT, folder=world)
    return world / "runs/recipe"


def test_a_player_is_pushed(spinlm, hub, finished, tmp_path):
    push = ("export", finished, "--iteration", "0", "--push-to-hub")
    out = spinlm(*push, "me/player", "--output", "player", folder=tmp_path, HF_TOKEN=TOKEN).out
    assert f"pushed to {hub.url}/me/player" in out
    repository = hub.repos["models/me/player"]
    files = repository.commits[repository.refs["main"]]
    assert repository.private and len(repository.commits) == 2  # the empty one, and all files at once
    exported = {path.name: path.read_bytes() for path in (tmp_path / "player").iterdir()}
    assert set(files) - {".gitattributes"} == set(exported)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "model"
    assert files["adapter_model.safetensors"] == exported["adapter_model.safetensors"]
    assert not any(str(finished.parents[1]).encode() in content for content in files.values())
    repository.private = False
    spinlm(*push, "me/player", "--merge", "--output", "merged", folder=tmp_path, HF_TOKEN=TOKEN)  # an existing one
    assert not repository.private and "model.safetensors" in repository.commits[repository.refs["main"]]


def test_pairs_are_pushed_as_a_data_set(spinlm, hub, finished, home, tmp_path):
    push = ("export", finished, "--pairs", "--push-to-hub", "me/pairs", "--output", "pairs")
    assert f"pushed to {hub.url}/datasets/me/pairs" in spinlm(*push, folder=tmp_path, HF_TOKEN=TOKEN).out
    repository = hub.repos["datasets/me/pairs"]
    assert repository.private
    exported = {
        str(p.relative_to(tmp_path / "pairs")): p.read_bytes() for p in (tmp_path / "pairs").rglob("*") if p.is_file()
    }
    assert exported.items() <= repository.commits[repository.refs["main"]].items()


def test_an_adapter_and_its_base_come_from_the_hub(spinlm, recipe, hub, folder, finished):
    """The base is the revision that the adapter's config names, not the newest one."""
    player = {path.name: path.read_bytes() for path in (finished / "iteration-0/player").iterdir()}
    named = {"base_model_name_or_path": "o/base", "revision": "v1"}
    config = json.dumps(json.loads(player["adapter_config.json"]) | named).encode()
    adapter = hub.commit("models/o/adapter", player | {"adapter_config.json": config})
    base = hub.commit("models/o/base", folder, ref="v1")
    hub.commit("models/o/base", {"README.md": b"gone"})
    run = play(spinlm, recipe(model={"path": "o/adapter"}, lora={}))
    expected = {"id": "o/adapter", "commit": adapter, "base": {"id": "o/base", "commit": base}}
    assert inputs(run)["model"] == expected
    saved = json.loads((run / "iteration-0/player/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("o/base", base)


@pytest.mark.parametrize(
    ("name", "token", "fault", "words"),
    [
        ("me/x", "", None, "may not write; (401); hf auth login"),
        ("them/x", TOKEN, None, "may not write; /them/x (403); hf auth login"),
        ("me/lfs", TOKEN, ("PUT /blobs", {"times": 99, "status": 507}), "could not be pushed; fails (507)"),
        ("me/last", TOKEN, ("POST .*/commit/", {"times": 99, "status": 503}), "could not be pushed; fails (503)"),
    ],
)
def test_a_push_that_fails(spinlm, hub, finished, tmp_path, name, token, fault, words):
    """The folder stays, complete, and the repository shows none of its files."""
    if fault:
        hub.fail(fault[0], **fault[1])
    push = ("export", finished, "--iteration", "0", "--push-to-hub", name, "--output", "new")
    message = spinlm(*push, folder=tmp_path, code=2, HF_TOKEN=token).message
    assert message.startswith(f"{name}: ") and all(part in message for part in words.split("; ")), message
    assert f"new is complete: upload it with `hf upload {name} new`" in message
    assert (tmp_path / "new" / "adapter_model.safetensors").exists()
    repository = hub.repos.get(f"models/{name}")
    assert repository is None or list(repository.commits[repository.refs["main"]]) == [".gitattributes"]


def test_a_push_survives_faults_that_pass(spinlm, hub, finished, tmp_path):
    hub.fail("POST /api/repos/create", status=503)
    hub.fail("POST .*/preupload/", status=429, headers={"Retry-After": "1"})
    hub.fail("POST .*/commit/", status=503)
    spinlm("export", finished, "--push-to-hub", "me/shaky", "--output", "new", folder=tmp_path, HF_TOKEN=TOKEN)
    repository = hub.repos["models/me/shaky"]
    assert "adapter_model.safetensors" in repository.commits[repository.refs["main"]]


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {"X_Error_Message": "Invalid credentials in Authorization header"}, "refuses the token (401)"),
        (403, {}, "refuses the token (403)"),
        (429, {"Retry_After": "0"}, "refuses more requests for now (429). Wait some minutes"),
        (500, {}, "fails (500)"),
        (504, {}, "fails (504)"),
        (418, {}, "answers 418"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_faults_that_do_not_pass(hub, monkeypatch, kind, status, headers, words):
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.log.clear()
    hub.faults[:] = []
    hub.fail("o/fault", times=99, status=status, headers=headers)
    ask = HfApi(endpoint=hub.url).repo_info
    with monkeypatch.context() as patch, pytest.raises(ModelError if kind == "model" else DataError) as caught:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        Repository("o/fault", kind=kind).call(lambda: ask("o/fault", repo_type=kind))
    assert str(caught.value).startswith("o/fault: ") and words in str(caught.value)
    assert len(hub.log) == (client.MAX_ATTEMPTS if status in (429, 500, 504) else 1)
