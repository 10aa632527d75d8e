"""Tools of the data reach every prompt: those of training, of the opponent, and of the exported pairs."""

import json

import datasets
from runs import read_rows, rows, write_rows
from transformers import AutoTokenizer

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tools_travel_from_the_data_to_the_pairs(cli, world, tmp_path):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    write_rows(tmp_path / "tools.jsonl", [{**row, "tools": [tool] if n % 2 else None} for n, row in enumerate(rows())])
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    changes = (f"data.path={tmp_path / 'tools.jsonl'}", f"data.chat_template={tmp_path / 'template.jinja'}")
    cli(
        *("run", world.recipe, *changes, "selfplay.iterations=1", "train.max_length=128", "train.epochs=1"),
        *("--run-dir", "run"),
        folder=tmp_path,
    )
    examples = {row["id"]: row for row in read_rows(tmp_path / "run" / "examples" / "train.jsonl")}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "start" / "player")

    def prompt_ids(messages, tools):
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for example in examples.values():
        assert example["prompt_ids"] == prompt_ids(example["messages"], example["tools"])
    assert {bool(example["tools"]) for example in examples.values()} == {True, False}

    cli("export", "run", "--pairs", "--output", "pairs", folder=tmp_path)
    pairs = list(datasets.load_dataset(str(tmp_path / "pairs"))["train"])
    assert {pair["tools"] for pair in pairs} == {None, json.dumps([tool])}
    for pair in pairs:
        tools = json.loads(pair["tools"]) if pair["tools"] else None
        assert prompt_ids(pair["prompt"], tools) == examples[pair["id"]]["prompt_ids"]
