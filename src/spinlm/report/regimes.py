"""The regime of each iteration of a run. Reads the run folder only; imports no torch."""

import math
from dataclasses import dataclass
from itertools import count
from typing import Any

from spinlm.evals.regime import (
    LINEAR_BETA_MARGIN,
    describe_regime,
    has_fair_samples,
    has_fixed_weights,
    is_fine_tuning,
)
from spinlm.rundir.layout import RunDir
from spinlm.rundir.provenance import read_recipe
from spinlm.utils.atomic import read_json


@dataclass(frozen=True)
class IterationRegime:
    """What was measured before an iteration's training, and the margin that training reached."""

    iteration: int
    values: dict[str, Any]  # the contents of regime.json
    beta_margin_by_epoch: list[float]  # mean over each epoch's steps; empty before training ends
    beta_margin_heldout: float | None  # of the held-out pairs after training
    sentences: list[str]
    is_fine_tuning: bool  # in expectation, the gradient is that of fine-tuning

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

    @property
    def beta_margin(self) -> float | None:
        """The largest |β·margin| when training ended, of training and held-out pairs; None before that."""
        ends = [*self.beta_margin_by_epoch[-1:], self.beta_margin_heldout]
        return max((abs(value) for value in ends if value is not None), default=None)

    def as_json(self) -> dict[str, Any]:
        measured = {"beta_margin_by_epoch": self.beta_margin_by_epoch, "beta_margin_heldout": self.beta_margin_heldout}
        return {"iteration": self.iteration, **self.values, "measured": measured, "sentences": self.sentences}


def regimes(folder: RunDir) -> list[IterationRegime]:
    """Return the regime of each iteration whose stage `regime` measured one."""
    recipe = read_recipe(folder)
    found: list[IterationRegime] = []
    for t in count(0):
        if not folder.marker("regime", t).exists():
            return found
        path = folder.regime(t)
        if not folder.metadata("regime", t)["outputs"]:
            continue
        folder.check_outputs("regime", t, path)
        values = read_json(path)
        trained = folder.metadata("train", t) if folder.marker("train", t).exists() else {}
        margins, beta = trained.get("margin_by_epoch", []), values.get("beta")  # None where nothing was measured
        evaluated = read_json(folder.eval_metrics(t)) if folder.marker("evaluate", t).exists() else {}
        heldout = None if beta is None or "margin" not in evaluated else beta * evaluated["margin"]
        measured = [] if beta is None else [beta * margin for margin in margins]
        sentences = describe_regime(values, recipe, t, margins)
        by_design = has_fair_samples(recipe, t) and has_fixed_weights(recipe, t)
        found.append(IterationRegime(t, values, measured, heldout, sentences, by_design or is_fine_tuning(values)))
    return found


def regime_verdict(folder: RunDir) -> str | None:
    """Say so if no iteration has tried anything but fine-tuning; None otherwise, or if nothing was measured."""
    trained = [regime for regime in regimes(folder) if folder.marker("train", regime.iteration).exists()]
    margins = [regime.beta_margin for regime in trained if regime.is_fine_tuning]
    highest = max((margin for margin in margins if margin is not None), default=math.inf)
    if len(margins) < len(trained) or None in margins or highest >= LINEAR_BETA_MARGIN:
        return None
    return (
        f"β·margin ended at {highest:.2f}, below {LINEAR_BETA_MARGIN}, and the gradient was that of fine-tuning with "
        "noise: nothing but fine-tuning has been tried."
    )
