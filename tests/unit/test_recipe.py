"""The recipe: which values are accepted, and the messages about those that are not."""

import contextlib
import json
import re
import tempfile
import types
import typing
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from random import Random
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

import spinlm
from spinlm.data.readers import _COMPRESSION, READERS
from spinlm.errors import RecipeError
from spinlm.recipe.fields import Section, iterate_fields, value_at
from spinlm.recipe.foreign_names import KEYS, VALUES
from spinlm.recipe.load import DATA_SUFFIXES, as_yaml, load_recipe, parse_recipe
from spinlm.recipe.objective import OBJECTIVES, Spin
from spinlm.recipe.schema import Recipe

SMALLEST = "model:\n  path: m\ndata:\n  path: d\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def load_error(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text, *overrides)
    return str(error.value).replace(f"{tmp_path}/", "")


def parse_error(**sections: Any) -> str:
    with pytest.raises(RecipeError) as error:
        parse_recipe({"model": {"path": "m"}, "data": {"path": "d"}} | sections)
    return str(error.value)


def served(**changes: Any) -> dict[str, Any]:
    server = {"api": "vllm", "urls": ["http://127.0.0.1:1/v1"], "launch_command": "serve"}
    return {"engine": "server", "server": server | changes}


# Values


def test_the_smallest_recipe_has_the_papers_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALLEST)
    assert (recipe.selfplay.iterations, recipe.selfplay.replay) == (4, 1)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.optimizer) == (2, 64, "rmsprop")
    assert (recipe.objective, recipe.train.learning_rate) == (Spin(beta=0.1), 5e-7)
    assert recipe.lora is None


@pytest.mark.parametrize(
    ("written", "value"),
    [("5e-7", 5e-7), ("5E-7", 5e-7), ("1e+2", 100.0), ("2", 2), ("0.5", 0.5), (".5", 0.5), ("1.5e-3", 0.0015)],
)
def test_numbers_as_people_write_them(tmp_path: Path, written: str, value: float) -> None:
    recipe = load(tmp_path, SMALLEST + f"train:\n  learning_rate: {written}\n")
    assert recipe.train.learning_rate == value


def test_values_for_each_iteration(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALLEST + "objective: {beta: [0.1, 0.2, 3, 5e-1]}\n")
    assert isinstance(recipe.objective, Spin)
    assert [value_at(recipe.objective.beta, t) for t in range(4)] == [0.1, 0.2, 3, 0.5]
    assert [value_at(recipe.train.learning_rate, t) for t in range(4)] == [5e-7] * 4


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, SMALLEST).seed = 1  # type: ignore[misc]


# Overrides


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        SMALLEST + "lora: {r: 4}\ntrain: {epochs: 7}\n",
        "train.epochs=1",
        "--train.learning_rate=5e-6",
        "objective.beta=[0.1, 0.2]",
        "selfplay.iterations=2",
        "selfplay.select.patience=3",
        "lora=null",
        "data.columns={prompt: question, response: answer}",
        "sft.epochs=2",
    )
    assert (recipe.train.epochs, recipe.train.learning_rate) == (1, 5e-6)
    assert (recipe.objective, recipe.selfplay.select.patience) == (Spin(beta=[0.1, 0.2]), 3)
    assert recipe.lora is None
    assert recipe.data.columns.response == "answer"
    assert recipe.sft is not None and recipe.sft.epochs == 2


@pytest.mark.parametrize("override", ["train.epochs", "=1", "train.epochs=", "train.epochs= "])
def test_an_override_without_key_or_value(tmp_path: Path, override: str) -> None:
    assert "write section.key=value" in load_error(tmp_path, SMALLEST, override)


def test_an_override_split_by_the_shell(tmp_path: Path) -> None:
    message = load_error(tmp_path, SMALLEST, "objective={name:", "sft}")
    assert "not valid YAML" in message and message.endswith(
        "Put the whole override in quotes, so that the shell does not split it"
    )
    assert "quotes, so" not in load_error(tmp_path, SMALLEST, "objective={name")


def test_an_override_into_a_value(tmp_path: Path) -> None:
    assert load_error(tmp_path, SMALLEST + "seed: 1\n", "seed.x=1") == "override 'seed.x=1': seed is not a section"
    assert load_error(tmp_path, SMALLEST, "model.path.x=1") == "override 'model.path.x=1': path is not a section"


def test_a_wrong_override_is_explained_like_a_wrong_recipe(tmp_path: Path) -> None:
    assert (
        load_error(tmp_path, SMALLEST, "train.epoch=1") == "recipe.yaml: train.epoch: unknown key; did you mean epochs?"
    )


# Paths


def test_paths_next_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("")
    recipe = load(tmp_path, SMALLEST)
    assert (recipe.data.path, recipe.model.path) == (str(tmp_path / "d"), "m")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(tmp_path, SMALLEST, "data.path=~/d.jsonl").data.path == "/home/someone/d.jsonl"
    assert "data.path: ~no_such_user/d" in load_error(tmp_path, SMALLEST, "data.path=~no_such_user/d")


# Error messages


def test_one_line_for_each_error(tmp_path: Path) -> None:
    message = load_error(tmp_path, "model: {pth: x}\ntrain: {epochs: 0, batch_size: many}\n")
    assert message.splitlines() == [
        "recipe.yaml: model.path: missing",
        "recipe.yaml: model.pth: unknown key; did you mean path?",
        "recipe.yaml: data: missing",
        "recipe.yaml: train.epochs: should be greater than or equal to 1, got 0",
        'recipe.yaml: train.batch_size: should be a valid integer, got "many"',
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean train?"),
        ({"selfplay": {"select": {"patiance": 1}}}, "selfplay.select.patiance: unknown key; did you mean patience?"),
        ({"warmup_sft": {}}, "warmup_sft: unknown key; did you mean sft?"),
        ({"tracking": []}, "tracking: unknown key; known: model, lora"),
        ({"train": {"sharding": "full"}}, "train.sharding: unknown key; known: epochs"),
        ({"train": {"checkpoint_every": 5}}, "train.checkpoint_every: unknown key; known: epochs"),
        (
            {"opponent": {"server": {"command": "x"}}},
            "opponent.server.command: unknown key; did you mean reload_command or launch_command?",
        ),
        ({"lora": {"rank_": 1, "r": 2}}, "lora.rank_: unknown key; known: r, alpha, dropout, target_modules"),
        ({"train": {"beta": 1}}, "train.beta: unknown key; did you mean objective.beta?"),
        (
            {"data": {"path": "x", "prompt": 1}},
            "data.prompt: unknown key; did you mean prompts or data.columns.prompt?",
        ),
        ({"epochs": 1}, "epochs: unknown key; did you mean train.epochs or sft.epochs?"),
        ({"train": {"x]": 1}, "seed": 1}, "train.x]: unknown key; known: epochs, batch_size"),
    ],
)
def test_unknown_keys(sections: dict[str, Any], message: str) -> None:
    assert parse_error(**sections).startswith(f"recipe: {message}")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"objective": {"name": "dpo"}}, ["spin", "preference data", "data.columns.rejected"]),
        ({"objective": {"name": "kto"}}, ["data.columns.rejected"]),
        ({"train": {"gradient_accumulation_steps": 8}}, ["train.batch_size", "train.tokens_per_micro_batch"]),
        ({"per_device_train_batch_size": 8}, ["train.batch_size", "train.tokens_per_micro_batch"]),
        ({"train": {"num_train_epochs": 3}}, ["use train.epochs"]),
        ({"train": {"lr": 1e-5}}, ["use train.learning_rate"]),
        ({"train": {"max_seq_length": 512}}, ["use train.max_length"]),
        ({"lora_r": 8, "lora": {"lora_alpha": 16}}, ["use lora.r", "use lora.alpha"]),
        ({"model": {"path": "m", "load_in_8bit": True}}, ["model.load_in_4bit"]),
        ({"train": {"bf16": True}}, ["use model.dtype"]),
        ({"train": {"deepspeed": "zero3.json"}}, ["use train.fsdp"]),
        ({"train": {"packing": True, "flash_attention": True}}, ["train.prefix_sharing"]),
        ({"train": {"neftune_noise_alpha": 5}}, ["not supported"]),
        ({"opponent": {"engine": "hf"}}, ["use local"]),
        ({"data": {"path": "d", "turns": "every"}}, ["use all"]),
        ({"model": {"path": "m", "dtype": "fp16"}}, ["bfloat16 or float32"]),
    ],
)
def test_names_of_other_trainers(sections: dict[str, Any], words: list[str]) -> None:
    message = parse_error(**sections)
    assert all(word in message for word in words), message
    assert "did you mean" not in message


def test_names_of_other_trainers_lead_to_fields_that_exist() -> None:
    fields = dict(iterate_fields(Recipe))
    for name, answer in KEYS.items():
        named = re.findall(r"\b(?:[a-z_]+\.)+[a-z_0-9]+\b", answer)
        assert named == [field for field in named if field in fields], name
        assert name not in Recipe.model_fields
    for field, values in VALUES.items():
        assert field.removesuffix(".name") in fields and values


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"learning_rate": "a"}}, 'train.learning_rate: should be a valid number (or a list), got "a"'),
        (
            {"train": {"learning_rate": "5e-7"}},
            'train.learning_rate: should be a valid number (or a list), got "5e-7"; remove the quotes',
        ),
        ({"train": {"learning_rate": 0}}, "train.learning_rate: should be greater than 0 (or a list), got 0"),
        ({"train": {"learning_rate": [1, "b"]}}, 'train.learning_rate.1: should be a valid number, got "b"'),
        (
            {"train": {"learning_rate": float("nan")}},
            "train.learning_rate: should be a finite number (or a list), got NaN",
        ),
        ({"lora": {"target_modules": "q"}}, "lora.target_modules: a text is a regular expression for whole names"),
        ({"lora": {"target_modules": [1]}}, "lora.target_modules.0: should be a valid string, got 1; put it in quotes"),
        (
            {"model": {"path": "m", "revision": 12}},
            "model.revision: should be a valid string, got 12; put it in quotes",
        ),
        ({"lora": 5}, "lora: should be a section with keys, got 5"),
        ({"train": None}, "train: should be a section with keys, got null"),
        ({"train": [1]}, "train: should be a section with keys, got [1]"),
        ({"seed": True}, "seed: should be a valid integer, got true"),
        ({"seed": 1.0}, "seed: should be a valid integer, got 1.0"),
        ({"opponent": {"top_p": 1.5}}, "opponent.top_p: should be less than or equal to 1, got 1.5"),
        ({"objective": {"link": "l2"}}, "objective.link: should be 'logistic', 'hinge' or 'exponential', got \"l2\""),
        ({"report_to": "wandb"}, 'report_to: should be a valid list, got "wandb"'),
        ({"model": {"path": {3: 4}}}, 'model.path: should be a valid string, got {"3": 4}'),
        ({"model": {"path": {(1,): 4}}}, "model.path: should be a valid string, got {(1,): 4}"),
    ],
)
def test_wrong_values(sections: dict[str, Any], message: str) -> None:
    whole = parse_error(**sections)
    assert whole.startswith(f"recipe: {message}")
    assert len(whole.splitlines()) == 1


def test_list_of_wrong_length() -> None:
    message = parse_error(objective={"beta": [0.1, 0.2, 0.3]})
    assert message.startswith("recipe: objective.beta: 3 values for 4 iterations.")


def test_preferences_last_one_iteration() -> None:
    data = {"path": "d", "columns": {"rejected": "worse"}}
    message = parse_error(data=data)
    assert message.startswith("recipe: data.columns.rejected: a prompt has one rejected response")
    two = parse_error(data=data, selfplay={"iterations": 1}, opponent={"samples_per_prompt": 2})
    assert two == message


def test_several_greedy_responses_to_a_prompt_are_refused() -> None:
    message = parse_error(opponent={"samples_per_prompt": 2, "temperature": 0})
    assert message.startswith("recipe: opponent: samples_per_prompt: greedy responses to one prompt are all equal")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mu": 2.0}, "objective.mu: not a setting of spin, only of space. Remove it"),
        (
            {"name": "space", "beta": [0.1] * 4},
            "objective.beta: not a setting of space, only of spin, dpo-positive, t-spin",
        ),
        ({"name": "space", "reference_mix": 0.5}, "not a setting of space, only of spin, dpo-positive"),
        ({"name": "sft", "nll_weight": 0.1}, "'objective={name: sft}'"),
        ({"name": "dpo"}, "objective.name: should be one of spin, dpo-positive, space, t-spin, sft, extrapolate, got"),
        ({"name": "t-spin", "betta": 1.0}, "objective.betta: unknown key; did you mean beta?"),
        (
            {"name": "space", "temperature": 1.0},
            "objective.temperature: unknown key; did you mean opponent.temperature?",
        ),
    ],
)
def test_key_of_another_objective(section: dict[str, Any], message: str) -> None:
    assert message in parse_error(objective=section)


def test_label_smoothing_needs_the_logistic_link() -> None:
    message = parse_error(objective={"link": "hinge", "label_smoothing": 0.1})
    assert "objective: label_smoothing needs link: logistic, but link is hinge" in message
    assert "objective.label_smoothing" in parse_error(objective={"label_smoothing": 0.5})


def test_objectives_by_name() -> None:
    for name, section in OBJECTIVES.items():
        if name == "extrapolate":
            continue  # has settings without a default
        assert with_objective(name=name).objective == section(name=name)


def with_objective(**section: Any) -> Recipe:
    return parse_recipe({"model": {"path": "m"}, "data": {"path": "d"}, "objective": section})


def test_an_objective_written_out_is_read_again() -> None:
    recipe = with_objective(name="space", mu=3.0)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("opponent", "message"),
    [
        ({"engine": "server"}, "opponent: engine is server, but the section opponent.server is missing"),
        (served() | {"engine": "local"}, "opponent: the section server is not used"),
        (served(urls=[], launch_command=None), "opponent.server: neither urls nor launch_command"),
        (
            served(urls=["127.0.0.1:8000"]),
            "opponent.server.urls.0: 127.0.0.1:8000 is not a URL that begins with http://",
        ),
        (served(urls=["http://me:secret@a"]), "opponent.server.urls.0: write the URL without a password"),
        (served(api="llama.cpp", launch_command=None), "api: llama.cpp has no endpoint that loads adapters"),
        (served(reload_command="reload"), "Remove one of them"),
        (served(launch_command=None, model="m"), "opponent.server: model is not used"),
        (served(api="ollama"), "opponent.server.api"),
    ],
)
def test_invalid_servers(opponent: dict[str, Any], message: str) -> None:
    assert message in parse_error(opponent=opponent, lora={})


def test_servers_and_adapters() -> None:
    assert "can load only LoRA adapters" in parse_error(opponent=served(launch_command=None))
    reloaded = served(launch_command=None, reload_command="reload {player}")
    assert "opponent.server.model: missing" in parse_error(opponent=reloaded, lora={})
    sections = {"model": {"path": "m"}, "data": {"path": "d"}, "lora": {}}
    for changes in ({"model": "adapter"}, {"reload_command": "reload {merged}"}, {"api": "llama.cpp"}):
        parse_recipe(sections | {"opponent": {"engine": "server", "server": reloaded["server"] | changes}})


def test_choosing_by_task_score_needs_a_scorer() -> None:
    assert "selfplay.select.metric: task_score needs a scorer" in parse_error(
        selfplay={"select": {"metric": "task_score"}}
    )


def test_extrapolation_needs_linear_weights_and_one_iteration() -> None:
    objective = {"name": "extrapolate", "run": "runs/control", "iteration": 0, "factor": 2.0}
    assert "Set selfplay.iterations: 1" in parse_error(objective=objective)
    message = parse_error(objective=objective, selfplay={"iterations": 1}, lora={"use_dora": True})
    assert "not linear in the adapter" in message


def test_excluding_correct_responses_needs_a_scorer() -> None:
    message = parse_error(opponent={"exclude_correct": True})
    assert "opponent.exclude_correct: needs a scorer" in message and "Set evaluate.scorer, or remove" in message


def test_temperatures_of_the_evaluation() -> None:
    assert "Set scorer, or remove temperatures" in parse_error(evaluate={"temperatures": [0.3]})
    scored = {"scorer": "exact_match"}
    assert "appears twice" in parse_error(evaluate=scored | {"temperatures": [0.3, 0.3]})
    for wrong in (0, 2.5):
        assert "evaluate.temperatures" in parse_error(evaluate=scored | {"temperatures": [wrong]})


@pytest.mark.parametrize("section", ["train", "sft"])
def test_fsdp_hides_shapes_from_the_optimizer(section: str) -> None:
    fsdp = {"train": {"fsdp": "full_shard"}}
    message = parse_error(**(fsdp | {section: {**fsdp.get(section, {}), "optimizer": "Adafactor"}}))
    assert message.startswith(f"recipe: {section}.optimizer: Adafactor needs whole weights")


IN_4_BITS = {"path": "m", "load_in_4bit": True}


def test_load_in_4bit_needs_an_adapter() -> None:
    assert "Add a section lora" in parse_error(model=IN_4_BITS)


def test_load_in_4bit_excludes_fsdp() -> None:
    message = parse_error(model=IN_4_BITS, lora={}, train={"fsdp": "full_shard"})
    assert "4-bit weights cannot be divided" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping of sections"),
        ("- a\n", "a recipe is a mapping of sections"),
        ("just words\n", "a recipe is a mapping of sections"),
        ("model: [\n", "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' appears twice (line 3)"),
        ("model:\n  path: x\n  path: y\n", "the key 'path' appears twice (line 3)"),
        ("lora:\n  # r: 4\n", "the key 'lora' has no value (line 1): write null for none, or {} for a section"),
        ("[a, b]: c\n", "not valid YAML"),
        ("seed: 2024-13-45\n", "not valid YAML"),
        ("seed: !!python/object:os.system {}\n", "not valid YAML"),
        ("seed: !!int ''\n", "not valid YAML"),
        ("seed: !!bool maybe\n", "not valid YAML"),
        ("seed: !!timestamp nope\n", "not valid YAML"),
        ("a:\n\tb: 1\n", "found character '\\t'"),
        ("a: b: c\n", "not valid YAML"),
        ("a: 1\rb: c: d", "not valid YAML"),
        ("a: x\u2028\nb: c: d", "not valid YAML"),
        ("a: &a 1\nseed: *a\n", "*a (line 2): aliases are not supported"),
        ("seed: 010\n", "010 (line 1): write a plain number"),
        ("seed: 1:30\n", "1:30 (line 1): write a plain number"),
    ],
)
def test_invalid_files(tmp_path: Path, text: str, message: str) -> None:
    whole = load_error(tmp_path, text)
    assert whole.startswith("recipe.yaml: ") and message in whole


def test_every_kind_of_data_file_but_json_is_no_recipe() -> None:
    assert set(DATA_SUFFIXES) == (READERS.keys() - {".json"}) | _COMPRESSION.keys()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe. `spinlm init` writes one"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match=r"rows.jsonl: this is a data file"):
        (tmp_path / "rows.jsonl").touch()
        load_recipe(tmp_path / "rows.jsonl")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": ""}}, "model.path: string should have at least 1 character"),
        ({"model": {"path": "x\ud800"}}, "model.path: should be a valid string"),
        ({"data": {"path": "https://me:secret@host/data.jsonl"}}, "data.path: https:// URLs are not supported"),
        ({"seed": -1}, "seed: should be greater than or equal to 0"),
        ({"seed": 1 << 63}, "seed: should be less than"),
        ({"seed": 10**5000}, "seed: should be less than"),
        (
            {"opponent": served(extra_body={"seed": float("nan")})},
            "a number that JSON cannot represent",
        ),
        ({"opponent": served(extra_body={"day": date(2024, 1, 1)})}, "opponent.server.extra_body.day: "),
        ({"opponent": served(extra_body={"api_key": "secret"})}, "opponent.server.extra_body: api_key would be stored"),
        ({"opponent": served(urls="http://me:secret@host/v1")}, "opponent.server.urls: should be a valid list"),
        (
            {"opponent": {"engine": "vllm", "vllm": {"engine_args": {"trust_remote_code": True}}}},
            "opponent.vllm.engine_args: trust_remote_code follows from the section model",
        ),
    ],
)
def test_invalid_values(changes: dict[str, Any], message: str) -> None:
    """No message shows a possible password."""
    whole = parse_error(**changes)
    assert message in whole and "secret" not in whole and len(whole) < 500


def test_impossible_paths_are_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {path: a/b}\ndata: {path: c/d}\n", encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml", [f"data.path={'x' * 300}"]).data.path == "x" * 300


# The schema itself


def test_no_field_without_help() -> None:
    assert not [name for name, field in iterate_fields(Recipe) if not field.description]


def leaves() -> list[str]:
    names = list(dict(iterate_fields(Recipe)))
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


@pytest.mark.parametrize("name", leaves())
def test_no_dead_knob(name: str) -> None:
    package = Path(spinlm.__file__).parent
    # A plan that shows a value is not yet a run that uses it.
    sources = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in ("recipe", "plan")]
    read = re.compile(rf"\.{name.rpartition('.')[2]}\b")
    assert any(read.search(path.read_text()) for path in sources), f"nothing in src/spinlm reads {name}"


# Random recipes

words = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8) | st.from_regex(
    r"[0-9]{1,3}e[0-9]{1,2}|0x[0-9a-f]{2}|[0-9]{1,4}|yes|null|~", fullmatch=True
)


def values_of(annotation: Any, metadata: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Valid values of a field of this type."""
    bounds = {name: value for one in metadata for name, value in vars_of(one).items()}
    match get_origin(annotation), annotation:
        case typing.Annotated, _:
            inner, *more = get_args(annotation)
            return values_of(inner, more)
        case typing.Literal, _:
            return st.sampled_from(get_args(annotation))
        case ((typing.Union | types.UnionType), _):
            return st.one_of(map(values_of, get_args(annotation)))
        case container, _ if container is list:
            return st.lists(values_of(get_args(annotation)[0]), max_size=3)
        case container, _ if container is dict:
            return st.dictionaries(words, st.none() | st.integers() | words, max_size=2)
        case _, kind if kind is float:
            low, high = bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le"))
            excluded = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds}
            return st.floats(low, high, **excluded, allow_nan=False, allow_infinity=False)
        case _, kind if kind is int:
            return st.integers(bounds.get("ge"), 10**6 if "ge" in bounds else None)
        case _, kind if isinstance(kind, type) and issubclass(kind, Section):
            return section_of(kind)
    return {bool: st.booleans(), str: words, type(None): st.none()}[annotation]


def vars_of(bound: Any) -> dict[str, Any]:
    if isinstance(bound, FieldInfo):
        return {name: value for one in bound.metadata for name, value in vars_of(one).items()}
    return {name: getattr(bound, name) for name in ("gt", "ge", "lt", "le") if getattr(bound, name, None) is not None}


def section_of(section: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values_of(field.annotation, field.metadata) for name, field in section.model_fields.items()}
    needed = {name for name, field in section.model_fields.items() if field.is_required()}
    return st.fixed_dictionaries(
        {name: fields[name] for name in needed}, optional={name: fields[name] for name in fields.keys() - needed}
    )


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Valid recipes: valid sections, adapted to each other."""
    values = draw(section_of(Recipe))
    values["model"]["path"], values["data"]["path"] = "org/model", "org/data"
    values["model"].pop("base", None)
    values["data"].pop("chat_template", None)
    values["data"].pop("columns", None)
    if isinstance((lora := values.get("lora") or {}).get("target_modules"), str):
        lora["target_modules"] = draw(st.sampled_from(["all-linear", r".*\.(q|v)_proj"]))
    game = values.setdefault("selfplay", {})
    count = game["iterations"] = draw(st.integers(1, 3))
    objective, train = values.setdefault("objective", {}), values.setdefault("train", {})
    for section, name in ((objective, "beta"), (train, "learning_rate")):
        if isinstance(section.get(name), list):
            section[name] = (section[name] + [0.5] * count)[:count]
    if objective.get("label_smoothing"):
        objective.pop("link", None)
    values.get("evaluate", {}).pop("temperatures", None)
    if objective.get("name") == "extrapolate":
        game["iterations"], objective["run"] = 1, "runs/control"
        train.pop("learning_rate", None)
        lora.pop("use_dora", None)
    train.pop("fsdp", None)
    values["model"].pop("load_in_4bit", None)
    game.pop("select", None)
    for name in ("engine", "server", "vllm", "exclude_correct"):
        values.get("opponent", {}).pop(name, None)
    return values


@given(values=recipes())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_dump_and_load(values: dict[str, Any]) -> None:
    recipe = parse_recipe(values)
    written = recipe.model_dump(mode="json")
    assert parse_recipe(json.loads(json.dumps(written))) == recipe
    with tempfile.TemporaryDirectory() as folder:
        assert load(Path(folder), as_yaml(written)) == recipe


@given(values=recipes(), chance=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_overrides_equal_values_in_the_file(values: dict[str, Any], chance: Random) -> None:
    """Overrides apply in any order, to single values and to whole sections."""
    overrides = []
    for section, value in values.items():
        if isinstance(value, dict) and (section in ("model", "data") or chance.random() < 0.7) and value:
            overrides += [f"{section}.{key}={json.dumps(one, ensure_ascii=False)}" for key, one in value.items()]
        else:
            overrides.append(f"{section}={json.dumps(value, ensure_ascii=False)}")
    chance.shuffle(overrides)
    with tempfile.TemporaryDirectory() as folder:
        assert load(Path(folder), SMALLEST, *overrides) == parse_recipe(values)


@given(values=recipes(), chance=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_unknown_key_in_any_section(values: dict[str, Any], chance: Random) -> None:
    place, names = values, []
    free = "chat_template_kwargs"  # any name is a variable of some template
    while inner := [name for name, value in place.items() if isinstance(value, dict) and name != free]:
        if chance.random() < 0.3:
            break
        names.append(chance.choice(inner))
        place = place[names[-1]]
    place["unheard_of"] = 1
    with pytest.raises(RecipeError) as error:
        parse_recipe(values)
    assert f"recipe: {'.'.join([*names, 'unheard_of'])}: unknown key; " in str(error.value)


known_names = st.sampled_from(sorted({part for name in dict(iterate_fields(Recipe)) for part in name.split(".")}))
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known_names | st.text(max_size=3), inner, max_size=4),
    max_leaves=15,
)


@given(
    text=st.text(max_size=60)
    | st.text("[]{}:&*!|>-#%@`'\"\n ,?abmodelpath0.1e~\t\\", max_size=60)
    | junk.map(lambda value: yaml.safe_dump(value, allow_unicode=True))
    | st.dictionaries(st.sampled_from(list(Recipe.model_fields)), junk).map(yaml.safe_dump),
    override=st.none() | st.text(max_size=20) | st.builds("{}.{}={}".format, known_names, known_names, st.text()),
)
@example(text="[" * 5000, override=None)
@example(text="model: &m {path: *m}\ndata: *m\n", override="model.path.x=[" + "{" * 3000)
@settings(max_examples=300, deadline=None)
def test_junk_raises_recipe_errors(text: str, override: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(RecipeError):
            load_recipe(path, [] if override is None else [override])
