"""What the first stage says before anything long begins."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from models import save_adapter, save_tiny_model, tiny_recipe
from spinlm.errors import ModelError
from spinlm.model.run import Run
from spinlm.recipe.adapter import with_adapter
from spinlm.rundir.layout import RunDir
from spinlm.stages.prepare import prepare


@pytest.mark.parametrize(("gpus", "processes", "noted"), [(4, 1, True), (1, 1, False), (0, 1, False), (4, 4, False)])
def test_one_process_on_several_gpus_says_how_to_use_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: int,
    processes: int,
    noted: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("spinlm.stages.prepare.world_size", lambda: processes)
    rows = [{"prompt": f"What is {n}?", "response": "Yes"} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"path": str(tmp_path / "data.jsonl"), "heldout": 1}
    recipe = tiny_recipe(save_tiny_model(tmp_path / "model"), data=data, lora={})
    with caplog.at_level("INFO", "spinlm"), Run(recipe, RunDir(tmp_path / "run")) as run:
        prepare(run)
    lines = [line for line in caplog.messages if "GPUs" in line]
    assert len(lines) == noted
    assert not noted or ("1 of 4 GPUs" in lines[0] and "torchrun --nproc-per-node 4 -m spinlm" in lines[0])


def test_a_merged_base_follows_its_adapter_until_the_first_result(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    save_adapter(model, tmp_path / "adapter", tokenizer=True)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {n}?", "response": "Yes"}) + "\n" for n in range(4)))
    template, folder = tmp_path / "adapter" / "chat_template.jinja", RunDir(tmp_path / "run")
    recipe = with_adapter(tiny_recipe(tmp_path / "adapter", data={"path": str(data), "heldout": 2}))
    template.write_text("{{ broken", encoding="utf-8")
    with pytest.raises(ModelError, match="chat template"):
        prepare(Run(recipe, folder))
    template.write_bytes((model / "chat_template.jinja").read_bytes())
    prepare(Run(recipe, folder))
    assert (folder.base / "chat_template.jinja").read_bytes() == template.read_bytes()
    made = (folder.base / "config.json").stat().st_ino
    prepare(Run(recipe, folder))
    assert (folder.base / "config.json").stat().st_ino == made
    shutil.rmtree(tmp_path / "adapter")
    assert Run(recipe, folder).players.base_model == str(folder.base)
    (folder.base / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="no such file or folder"):
        _ = Run(recipe, folder).players.base_model
