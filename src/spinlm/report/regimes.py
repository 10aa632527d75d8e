"""The regime of each iteration of a run. Reads the run folder only; imports no torch."""

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
    fine_tuning: bool  # the gradient is that of fine-tuning in expectation, and β·margin stayed small

    @property
    def text(self) -> str:
        return " ".join(self.sentences)

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
        margins, beta = trained.get("margin_by_epoch", []), values.get("beta", 1.0)
        heldout = None
        if folder.marker("evaluate", t).exists():
            heldout = read_json(folder.eval_metrics(t)).get("margin")
        heldout = None if heldout is None else beta * heldout
        measured = [beta * margin for margin in margins]
        reached = [value for value in (*measured[-1:], heldout) if value is not None]
        fine_tuning = bool(reached) and max(map(abs, reached)) < LINEAR_BETA_MARGIN and _is_expected(values, recipe, t)
        sentences = describe_regime(values, recipe, t, margins)
        found.append(IterationRegime(t, values, measured, heldout, sentences, fine_tuning))
    return found


def _is_expected(values: dict[str, Any], recipe: dict[str, Any], t: int) -> bool:
    """Whether the gradient is that of fine-tuning: by the measurement, or because all responses are fair samples."""
    return is_fine_tuning(values) or (has_fair_samples(recipe, t) and has_fixed_weights(recipe))


def regime_verdict(folder: RunDir) -> str | None:
    """Say so if no iteration has tried anything but fine-tuning; None otherwise, or if nothing was measured."""
    measured = [regime for regime in regimes(folder) if regime.beta_margin_by_epoch]
    if not measured or not all(regime.fine_tuning for regime in measured):
        return None
    highest = max(
        value
        for regime in measured
        for value in (regime.beta_margin_by_epoch[-1], regime.beta_margin_heldout)
        if value is not None
    )
    return (
        f"β·margin ended at {highest:.2f}, below {LINEAR_BETA_MARGIN}, and the gradient was that of fine-tuning with "
        "noise: nothing but fine-tuning has been tried."
    )
