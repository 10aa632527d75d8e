"""How the held-out NLL goes, epoch by epoch."""

import numpy as np

from spinlm.distributed import processes
from spinlm.evals.heldout import real_nll_and_margins
from spinlm.model.players import Players
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, read_lines
from spinlm.utils.atomic import read_json, short_digest, write_json


class Curve:
    """Held-out NLL of a player in training, nats per token, by epoch. What was measured survives as checkpoints do."""

    def __init__(self, recipe: Recipe, run: RunDir, players: Players, iteration: int, prefix_sharing: bool):
        self._players, self._prefix_sharing, self._budget = players, prefix_sharing, recipe.train.tokens_per_micro_batch
        self._path = run.nll_curve(iteration)
        self._heldout = list(read_lines(run.examples("heldout"), Example))
        self.values: dict[str, float] = processes.on_rank_zero(self._kept)

    def _kept(self) -> dict[str, float]:
        """What was measured before, unless it has changed since: training may end by it."""
        noted = read_json(self._path) if self._path.exists() else {}
        if not isinstance(noted, dict) or noted.get("sum") != short_digest(noted.get("values")):
            return {}
        return dict(noted["values"])

    def measure(self, epoch: int) -> float:
        """The NLL now, after so many epochs; where it was measured before, the value of then."""
        if str(epoch) not in self.values:
            real = real_nll_and_margins(self._players, self._heldout, self._prefix_sharing, self._budget)
            # All processes have measured the same; they go by what the first makes of it.
            self.values[str(epoch)] = processes.on_rank_zero(lambda: float(np.mean(real.nll)))
            processes.on_rank_zero(write_json, self._path, {"values": self.values, "sum": short_digest(self.values)})
        return self.values[str(epoch)]
