"""What a finished run says of its regimes."""

from pathlib import Path
from typing import Any

import pytest
from rundirs import finish, finish_sft

from models import tiny_recipe
from spinlm.report.regimes import regime_verdict, regimes
from spinlm.rundir.layout import RunDir
from spinlm.rundir.resume import claim_recipe
from spinlm.utils.atomic import write_json

MEASURED = {
    **{"prompts": 2, "pairs": 2, "beta": 0.5, "real_tokens": 25.0, "forecast": None, "noise_ratio": 2.0},
    **{"cosine": 0.9, "cosine_corrected": 0.95, "cosine_corrected_error": 0.1, "synthetic_noise_share": 0.4},
}


def played(folder: Path, values: dict[str, Any], margin: float, heldout: float, **opponent: Any) -> RunDir:
    """Complete iteration 0 of a run with β = 0.5; margins are in nats."""
    run = RunDir(folder)
    claim_recipe(run, tiny_recipe(folder, objective={"beta": 0.5}, opponent=opponent))
    finish_sft(run)
    finish(run, ("generate", 0), ("reference_logprobs", 0))
    write_json(run.regime(0), values)
    run.complete("regime", 0, [run.regime(0)])
    run.complete("train", 0, [], margin_by_epoch=[0.0, margin])
    write_json(run.eval_metrics(0), {"margin": heldout})
    run.complete("evaluate", 0, [run.eval_metrics(0)])
    return run


@pytest.mark.parametrize(
    ("values", "margin", "heldout", "opponent", "expected"),
    [
        (MEASURED, 0.4, 0.5, {}, "0.25"),  # 0.5 · 0.5
        (MEASURED, 0.4, -0.5, {}, "0.25"),  # the size counts
        (MEASURED, 0.4, 0.7, {}, None),  # 0.5 · 0.7 is above 0.3
        (MEASURED, 0.7, 0.1, {}, None),
        (MEASURED | {"cosine_corrected": 0.2}, 0.4, 0.5, {"temperature": 0.0}, None),  # another direction
        (MEASURED | {"cosine_corrected": 0.2}, 0.4, 0.5, {}, "0.25"),  # fair samples: the direction is known
        ({"not_measured": "of its memory"}, 0.4, 0.5, {}, None),  # β·margin has no scale
    ],
)
def test_nothing_but_fine_tuning(tmp_path, values, margin, heldout, opponent, expected):
    verdict = regime_verdict(played(tmp_path, values, margin, heldout, **opponent))
    assert (verdict is None) == (expected is None)
    assert expected is None or f"β·margin ended at {expected}" in str(verdict)


def test_a_regime_that_was_not_measured_has_no_beta_margin(tmp_path):
    (regime,) = regimes(played(tmp_path, {"not_measured": "of its memory"}, 0.4, 0.5))
    assert regime.as_json()["measured"] == {"beta_margin_by_epoch": [], "beta_margin_heldout": None}
    assert "not measured, because of its memory" in regime.text
