"""A chat template that writes an empty think block into every finished assistant message."""

import json
from pathlib import Path

import datasets
import pytest
from runs import read_jsons, read_pairs, read_rows, write_rows
from transformers import AutoTokenizer

from models import save_tiny_model

BLOCK = "<think>\n\n</think>\n\n"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not no_block %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RECIPE = """\
model: {path: model}
lora: {r: 8, alpha: 16}
data: {path: data.jsonl, chat_template: template.jinja, prompts: 40, heldout: 10}
sft: {epochs: 12, learning_rate: 2e-2, batch_size: 4}
opponent: {max_new_tokens: 30, temperature: 0}
selfplay: {iterations: 1, guard: null}
train: {epochs: 1, batch_size: 8, learning_rate: 1e-3, optimizer: adamw, max_length: 128}
evaluate: {scorer: json_fields}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("think")
    save_tiny_model(folder / "model")
    write_rows(folder / "data.jsonl", [{"prompt": f"What is {n}?", "response": '{"a": 1}'} for n in range(60)])
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def test_identical_responses_have_the_full_score(session_cli, folder):
    session_cli("run", "recipe.yaml", "--run-dir", "run", folder=folder)
    metrics = json.loads((folder / "run/start/eval.json").read_text())
    assert (metrics["identical_rate"], metrics["task_score"]) == (1.0, 1.0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "run/start/player")
    responses = {row["id"]: row for row in read_rows(folder / "run/start/heldout_greedy.jsonl")}
    for example in read_rows(folder / "run/examples/heldout.jsonl"):
        response = responses[example["id"]]
        assert tokenizer.decode(response["token_ids"]) == BLOCK + '{"a": 1}<|im_end|>', "the block was learned"
        assert example["response"] == response["text"] == '{"a": 1}'


def test_check_shows_both_texts_and_fails(session_cli, folder):
    result = session_cli("check", "recipe.yaml", folder=folder, code=2)
    assert "16 of the responses" in result.err
    assert repr('{"a": 1}') in result.err and repr(BLOCK + '{"a": 1}') in result.err
    assert "data.chat_template_kwargs" in result.err
    # The variable makes rendered responses equal those of the data, and every player's template sets it.
    assert "Ready" in session_cli("check", "recipe.yaml", "data.chat_template_kwargs.no_block=true", folder=folder).out


def test_exported_pairs_have_the_block_on_neither_side(session_cli, folder):
    rows = [{"prompt": f"What is {n}?", "response": json.dumps({"a": n % 7})} for n in range(60)]
    write_rows(folder / "various.jsonl", rows)
    session_cli("run", "recipe.yaml", "data.path=various.jsonl", "--run-dir", "various", folder=folder)
    session_cli("export", "various", "--pairs", "--output", "pairs", folder=folder)
    run, tokenizer = folder / "various", AutoTokenizer.from_pretrained(folder / "various/start/player")
    ours = {pair["id"]: pair for pair in read_pairs(run, 0, "train")}
    learned = [row for row in read_jsons(run, "iteration-0/generations/train-*.jsonl") if row["finished"]]
    assert any(tokenizer.decode(row["token_ids"]).startswith(BLOCK) for row in learned)
    exported = datasets.load_dataset(str(folder / "pairs"))["train"]
    assert len(exported) > 0
    for row in exported:
        pair = ours[row["id"]]
        for column, ids in (("chosen", pair["real_ids"]), ("rejected", pair["synthetic_ids"])):
            assert BLOCK not in row[column][0]["content"]
            rendered = tokenizer.apply_chat_template(row["prompt"] + row[column], tokenize=False)
            assert rendered == tokenizer.decode(pair["prompt_ids"] + ids) + "\n", "a program renders what was measured"
