"""SFT: make the starting player θ_0, by supervised fine-tuning if the recipe asks for it."""

import logging

from spinlm.evals.heldout import HeldoutNLL
from spinlm.model.prefix_trees import PrefixTree
from spinlm.model.run import Run
from spinlm.rundir.records import Example, read_lines
from spinlm.rundir.stage_graph import START
from spinlm.training.batches import SftDataset, sft_loss
from spinlm.training.step_log import step_recorder
from spinlm.training.trainer import TrainConfig, Trainer
from spinlm.utils.seeds import derive_seed

log = logging.getLogger("spinlm")


def sft(run: Run) -> None:
    """Make and save θ_0: the recipe's model, with a fresh adapter under LoRA, fine-tuned as `sft` says."""
    with run.stage("sft") as stage:
        if stage.done:
            return
        heldout = list(read_lines(run.folder.examples("heldout"), Example))
        sharing = run.players.measure_prefix_sharing(_probe_trees(heldout, run.recipe.train.max_length))
        heldout_nll = HeldoutNLL(run, START)
        if run.recipe.sft is None:
            run.players.save(START)
        else:
            _fine_tune(run, heldout_nll)
        stage.outputs = [run.folder.player(START)]
        stage.metadata = {"heldout_nll_by_epoch": heldout_nll.values, "prefix_sharing": sharing}


def _fine_tune(run: Run, heldout_nll: HeldoutNLL) -> None:
    settings = run.recipe.sft
    assert settings is not None

    def measure(epoch: int) -> bool:
        is_new = str(epoch) not in heldout_nll.values
        nll = heldout_nll.measure(epoch)
        if is_new:
            log.info(
                "sft: held-out NLL %.4f nats per token %s", nll, f"after epoch {epoch}" if epoch else "before training"
            )
        return True

    measure(0)
    config = TrainConfig.from_recipe(
        run.recipe.train,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        optimizer=settings.optimizer,
        seed=derive_seed(run.recipe.seed, "warmup"),
    )
    trainer = Trainer(run.players, config, checkpoints=run.folder.checkpoints(START), label="sft")
    examples = run.folder.examples("train" if settings.prompts is None else "sft")
    trainer.fit(SftDataset(examples), sft_loss, on_step=step_recorder(run, "sft", START), on_epoch=measure)
    trainer.save_player(START)


def _probe_trees(examples: list[Example], max_length: int) -> list[PrefixTree]:
    """Return trees to measure prefix sharing on: two or three prompts, among them the longest, with two responses."""
    longest = sorted(examples, key=lambda example: -len(example.prompt_ids))[:1]
    chosen = longest + [example for example in examples[:2] if example not in longest]
    return [
        PrefixTree(
            example.prompt_ids,
            (example.response_ids, examples[-1 - index].response_ids[: max_length - len(example.prompt_ids)]),
        )
        for index, example in enumerate(chosen)
    ]
