"""Train: the main player starts from θ_t and learns to tell the real responses from the opponent's."""

import logging
from collections.abc import Callable

from spinlm.distributed.processes import on_rank_zero
from spinlm.evals.collapse import detect_collapse
from spinlm.evals.heldout import HeldoutNLL
from spinlm.model.run import Run
from spinlm.recipe.fields import value_at
from spinlm.recipe.objective import Extrapolation
from spinlm.rundir.stage_graph import START
from spinlm.stages.extrapolate import write_extrapolated
from spinlm.training.batches import PairDataset, SftDataset, TrainDataset, pair_loss, sft_loss
from spinlm.training.pairs import no_pairs_reason
from spinlm.training.step_log import means_by_epoch, step_recorder
from spinlm.training.trainer import LossFunction, TrainConfig, Trainer
from spinlm.utils.atomic import read_json
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


def train(run: Run, t: int) -> None:
    """Train the main player of iteration `t`, and save it as θ_{t+1}.

    Raises:
        TrainingError: a loss or gradient is not finite.
    """
    with run.stage("train", t) as stage:
        if stage.done:
            return
        if isinstance(objective := run.recipe.objective, Extrapolation):
            stage.metadata = on_rank_zero(write_extrapolated, run.folder, objective, t)
            stage.outputs = [run.folder.player(t)]
            return
        run.players.load(t - 1)  # θ_t
        dataset, loss_fn = _dataset_and_loss(run, t)
        if len(dataset.batch_cost) == 0:
            log.warning("iteration %d: %s; there is nothing to learn", t, no_pairs_reason(run.recipe))
        settings = run.recipe.train
        rate, seed = value_at(settings.learning_rate, t), derive_seed(run.recipe.seed, "train", t)
        config = TrainConfig.from_recipe(settings, learning_rate=rate, seed=seed)
        heldout_nll = HeldoutNLL(run, t)
        trainer = Trainer(run.players, config, checkpoints=run.folder.checkpoints(t), label=f"iteration {t}: train")
        recorder, guard = step_recorder(run, "train", t), _collapse_guard(run, t, heldout_nll)
        steps = trainer.fit(dataset, loss_fn, on_step=recorder, on_epoch=guard)
        trainer.save_player(t)
        stage.outputs = [run.folder.player(t)]
        values = heldout_nll.values
        stage.metadata = {"steps": steps, "pairs": dataset.num_pairs, "heldout_nll_by_epoch": values}
        margins = on_rank_zero(means_by_epoch, run.folder, "train", t, "margin")
        stage.metadata |= {"margin_by_epoch": margins} if margins else {}


def _dataset_and_loss(run: Run, t: int) -> tuple[TrainDataset, LossFunction]:
    recipe = run.recipe
    if recipe.is_control:  # a step has as many examples as a step of self-play has prompts
        return SftDataset(run.folder.examples("train"), batch_cost=recipe.synthetic_per_prompt(t)), sft_loss
    return PairDataset(run.train_pairs(t), recipe.train.batch_size), pair_loss(recipe, t)


def _collapse_guard(run: Run, t: int, heldout_nll: HeldoutNLL) -> Callable[[int], bool]:
    """Return a function that returns False after an epoch in which the held-out NLL exceeds the guard's bound.

    Training then ends, the player is saved and evaluated, and `promote` stops the run. The last epoch is not checked
    here, because `promote` checks the evaluated player by more metrics.
    """
    guard, epochs = run.recipe.selfplay.guard, run.recipe.train.epochs
    if guard is None or epochs == 1:
        return lambda epoch: True
    on_rank_zero(run.folder.require, "evaluate", START)
    start = read_json(run.folder.eval_metrics(START))

    def should_continue(epoch: int) -> bool:
        if epoch == epochs:
            return True
        signs = detect_collapse(guard, start, {"heldout_nll": heldout_nll.measure(epoch)})
        if signs:
            log.warning("iteration %d: collapse, training ends after epoch %d: %s", t, epoch, signs)
        return not signs

    return should_continue
