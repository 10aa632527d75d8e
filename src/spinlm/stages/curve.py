"""How the held-out NLL goes, epoch by epoch."""

import numpy as np

from spinlm import team
from spinlm.config import Recipe
from spinlm.evals.heldout import judge_real
from spinlm.files import read_json, short_digest, write_json
from spinlm.model.players import Players
from spinlm.records import Example, read_lines
from spinlm.rundir import RunDir


class Curve:
    """Held-out NLL of a player in training, nats per token, by epoch. What was measured survives as checkpoints do."""

    def __init__(self, recipe: Recipe, run: RunDir, players: Players, iteration: int, packing: str):
        self._players, self._packing, self._budget = players, packing, recipe.train.tokens_per_micro_batch
        self._path = run.nll_curve(iteration)
        self._heldout = list(read_lines(run.examples("heldout"), Example))
        self.values: dict[str, float] = team.first(self._kept)

    def _kept(self) -> dict[str, float]:
        """What was measured before, unless it has changed since: training may end by it."""
        noted = read_json(self._path) if self._path.exists() else {}
        if not isinstance(noted, dict) or noted.get("sum") != short_digest(noted.get("values")):
            return {}
        return dict(noted["values"])

    def measure(self, epoch: int) -> float:
        """The NLL now, after so many epochs; where it was measured before, the value of then."""
        if str(epoch) not in self.values:
            real = judge_real(self._players, self._heldout, self._packing, self._budget)
            # All processes have measured the same; they go by what the first makes of it.
            self.values[str(epoch)] = team.first(lambda: float(np.mean(real.nll)))
            team.first(write_json, self._path, {"values": self.values, "sum": short_digest(self.values)})
        return self.values[str(epoch)]
