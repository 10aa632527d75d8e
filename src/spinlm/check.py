"""Check: try everything that a run depends on once, on a few examples, with the code of a run."""

import contextlib
import logging
import math
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from spinlm.errors import DataError, ModelError, shortened
from spinlm.evals.regime import check_regime, describe_regime
from spinlm.evals.scorers import get_scorer
from spinlm.generation import local_engine, open_engine
from spinlm.generation.base import Engine, Sampling
from spinlm.model.loading import disable_dropout, load_model
from spinlm.model.logprobs import LogProbs
from spinlm.model.players import Players
from spinlm.model.prefix_trees import PrefixTree, micro_batches, pack_batch
from spinlm.model.quantize import count_parameters
from spinlm.model.run import Run
from spinlm.model.trained_layers import describe_trained
from spinlm.plan import make_plan
from spinlm.recipe.adapter import with_adapter
from spinlm.recipe.objective import Spin
from spinlm.recipe.schema import Recipe
from spinlm.rundir.fork import borrow_start, check_source
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, Generation, count_records, read_lines
from spinlm.rundir.stage_graph import START
from spinlm.stages.generate import generate
from spinlm.stages.prepare import prepare
from spinlm.stages.reference_logprobs import MAX_LOGPROB_MISMATCH, MISMATCH_CAUSE, reference_logprobs
from spinlm.stages.regime import is_measured, measure_regime
from spinlm.stages.sft import sft
from spinlm.training.activation_checkpointing import free_bytes, set_activation_checkpointing
from spinlm.training.batches import PairDataset, PromptGroup, pair_loss
from spinlm.training.memory import MEMORY_MARGIN
from spinlm.training.pairs import no_pairs_reason
from spinlm.training.step_log import check_trackers
from spinlm.utils.atomic import read_json

EXAMPLES = 8
MAX_ROUNDING_GAP = 0.1  # nats between two tokens whose order rounding can change


def check(recipe: Recipe, start_from: Path | None = None) -> Iterator[str]:
    """Try a recipe on a few examples, without its SFT; yield each finding as a line or a paragraph.

    With `start_from`, the examples and the starting player of another run are used. Nothing is written to that run.

    Raises:
        SpinError: the first thing that is wrong.
    """
    plan = make_plan(recipe)
    for reason in plan.refusals:
        raise DataError(reason)
    recipe = with_adapter(recipe, download=True)
    source = None if start_from is None else RunDir(start_from)
    has_start = recipe.sft is None or source is not None
    measured = has_start and is_measured(recipe)
    examples = max(EXAMPLES, recipe.evaluate.regime_prompts) if measured else EXAMPLES
    small = _small_recipe(recipe, examples)
    with tempfile.TemporaryDirectory(prefix="spinlm-check-") as folder, Run(small, RunDir(Path(folder))) as run:
        began = time.monotonic()
        check_trackers(recipe.report_to)
        if source is not None:
            check_source(recipe, run.folder, source)
            borrow_start(run.folder, source, {"train": examples, "heldout": EXAMPLES, "sft": 0})
        prepare(run)
        _check_scorer(run)
        yield from _check_text(run)
        yield _check_model(run, began)
        if recipe.model.base is not None:
            yield f"start: {recipe.start}"
        yield describe_trained(run.players.model)
        with _without_log():
            sft(run)
        yield _describe_prefix_sharing(run)
        yield from _check_responses(run)
        yield from _check_engine(run)
        with _without_log():
            reference_logprobs(run, 0)
        yield from _check_rates(run.folder.metadata("reference_logprobs", 0)["train"])
        regime, advice = check_regime(run, has_sft=not has_start)
        yield from (regime, *(f"  {line}" for line in advice))
        pairs = PairDataset([run.folder.pairs(0, "train", 0)], recipe.train.batch_size)
        groups = [pairs[index] for index in range(len(pairs.batch_cost))]
        if not pairs.num_pairs:
            yield f"{no_pairs_reason(recipe)}: self-play has nothing to learn from these prompts"
            return
        yield _check_first_step(run, groups)
        if measured:
            prompts = plan.prompts if source is None else count_records(source.examples("train"))
            yield from (f"regime: {line}" for line in describe_regime(measure_regime(run, 0, prompts), recipe, 0))
        if small.model.load_in_4bit:
            yield _check_4bit(run, groups)
        yield _check_memory(run, groups)
        if recipe.is_control:
            yield "note: the control was checked as self-play, which takes more memory and time"
        yield 'Ready, with warnings: see "regime" above.' if advice else "Ready: `spinlm run` can start."


def _small_recipe(recipe: Recipe, examples: int) -> Recipe:
    """Return the recipe with a few examples in one shard, self-play in place of a control, no SFT and no trackers."""
    data = recipe.data
    sizes = {"prompts": min(examples, data.prompts or examples), "heldout": min(EXAMPLES, data.heldout)}
    update: dict[str, Any] = {
        "data": data.model_copy(update=sizes),
        "opponent": recipe.opponent.model_copy(update={"shard_size": examples}),
        "sft": None,
        "objective": Spin() if recipe.is_control else recipe.objective,
        "report_to": [],
    }
    return recipe.model_copy(update=update)


def _check_scorer(run: Run) -> None:
    """Score each real response against itself. Otherwise a scorer for another kind of data would fail after the SFT.

    Raises:
        DataError: the scorer cannot read a real response.
    """
    if run.recipe.evaluate.scorer is not None:
        scorer = get_scorer(run.recipe.evaluate.scorer)
        for split in ("heldout", "train") if run.recipe.opponent.exclude_correct else ("heldout",):
            for example in read_lines(run.folder.examples(split), Example):
                scorer(example.response, example.response)


def _check_rates(rates: dict[str, float]) -> Iterator[str]:
    """Say how far the engine's log-probabilities are from ours, and how many responses are identical or truncated."""
    if "logprob_mismatch_mean" in rates:
        yield (
            f"engine: its log-probabilities differ from ours by {rates['logprob_mismatch_mean']:.1e} nats per token on "
            f"average, {rates['logprob_mismatch_max']:.1e} at most"
        )
        if rates["logprob_mismatch_mean"] > MAX_LOGPROB_MISMATCH[torch.bfloat16]:
            yield f"warning: rounding does not explain that. {MISMATCH_CAUSE}"
    correct = f"{rates['correct_rate']:.0%} are correct and make no pair, " if "correct_rate" in rates else ""
    yield (
        f"synthetic responses: {rates['identical_rate']:.0%} equal the real one, {correct}"
        f"{rates['truncated_rate']:.0%} are truncated"
    )


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Silence the log of a stage, because `check` prints the results of the stage as findings."""
    log = logging.getLogger("spinlm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _check_text(run: Run) -> Iterator[str]:
    tokenizer, renderer = run.players.tokenizer, run.players.renderer
    example = next(read_lines(run.folder.examples("train"), Example))
    prompt, response = (indent(tokenizer.decode(ids), "  ") for ids in (example.prompt_ids, example.response_ids))
    yield f"prompt, as the opponent reads it:\n{prompt}"
    yield f"real response, as the main player learns it:\n{response}"
    stop_tokens = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in renderer.stop_ids)
    end = tokenizer.convert_ids_to_tokens(renderer.end_id)
    yield f"end of turn: {end!r}; a response stops at {stop_tokens}"
    rows = read_json(run.folder.skipped_rows)
    if rows["responses_changed"]:
        raise DataError(
            f"{rows['responses_changed']} of the responses read here are rendered as text that differs from the data: "
            "the chat template or the tokenizer changes them, and the main player would learn to write the changed "
            "text.\n" + "\n".join(rows["changed_responses"]) + "\nGive a template that renders responses as they are "
            "(data.chat_template, data.chat_template_kwargs), or write the rendered form into the data. `spinlm run` "
            "trains on the rendered text, and scores and exports real and synthetic responses alike"
        )


def _check_model(run: Run, began: float) -> str:
    players = run.players
    parameters = list(players.model.parameters())
    trained = sum(parameter.numel() for _, parameter in players.parameters())
    quantized = count_parameters(parameter for parameter in parameters if hasattr(parameter, "quant_state"))
    return (
        f"model: {count_parameters(parameters):,} parameters, {trained:,} of them trained, on {players.device} in "
        f"{players.dtype}{f' and {quantized:,} in 4 bits' if quantized else ''}; "
        f"loaded in {time.monotonic() - began:.0f} s"
    )


def _describe_prefix_sharing(run: Run) -> str:
    gaps = read_json(run.folder.prefix_sharing)["nats_per_token"]
    return (
        f"prefix sharing: {'on' if run.players.prefix_sharing else 'off'}; difference from the model's own "
        "log-probabilities, in nats per token: " + ", ".join(f"{gap:.1e} with {name}" for name, gap in gaps.items())
    )


def _check_responses(run: Run) -> Iterator[str]:
    """Generate responses, and show three of them with their prompts and the real responses."""
    began = time.monotonic()
    generate(run, 0)
    seconds = time.monotonic() - began
    generations = _generations(run)
    tokens = sum(len(generation.token_ids) for generation in generations)
    if run.recipe.preferences:
        yield f"rejected responses of the data: {tokens} tokens for {len(generations)} prompts, for example:"
    else:
        yield f"opponent: {tokens} tokens for {len(generations)} prompts in {seconds:.1f} s, for example:"
    examples = {example.id: example for example in read_lines(run.folder.examples("train"), Example)}
    for generation in generations[:3]:
        example = examples[generation.id]
        yield (
            f"  prompt     {_one_line(example.messages[-1]['content'])}\n  real       {_one_line(example.response)}\n"
            f"  synthetic  {_one_line(generation.text)}"
        )


def _generations(run: Run) -> list[Generation]:
    return list(read_lines(run.folder.generations(0, "train", 0), Generation))


def _check_engine(run: Run) -> Iterator[str]:
    """Compare the greedy responses of the recipe's engine with those of the local engine."""
    recipe, players, name = run.recipe, run.players, run.recipe.opponent.engine
    if name == "local" or recipe.preferences:
        return
    examples = list(read_lines(run.folder.examples("train"), Example))
    prompts = [example.prompt_ids for example in examples]
    stop_ids = players.renderer.stop_ids
    sampling = Sampling.from_recipe(recipe, stop_ids, temperature=0.0, top_p=1.0, samples=1)

    def greedy(engine: Engine) -> list[list[int]]:
        return [response.token_ids for (response,) in engine.generate(prompts, sampling, 0, lambda ended, tokens: None)]

    with open_engine(players, 0) as engine:
        external = greedy(engine)
    players.load(START)
    local = greedy(local_engine(players))
    differing = [index for index, ids in enumerate(local) if ids != external[index]]
    equal = f"{len(local) - len(differing)}/{len(local)}"
    line = f"engine: {equal} greedy responses of {name} equal those of the local engine"
    if differing:
        index = differing[0]
        difference = _first_difference(players, prompts[index], local[index], external[index])
        line += f"; response {index + 1} {difference}"
    yield line
    responses = {example.id: ids for example, ids in zip(examples, external, strict=True)}
    sampled = [generation for generation in _generations(run) if generation.sample == 0]
    if recipe.opponent.temperature > 0 and all(responses[row.id] == row.token_ids for row in sampled):
        yield (
            f"warning: every response that {name} sampled equals its greedy response. Either the model is very sure, "
            "or the server ignores opponent.temperature"
        )


def _first_difference(players: Players, prompt: list[int], local: list[int], external: list[int]) -> str:
    """Say where two responses differ, and how far apart the two tokens are under the model."""
    same = next((i for i, (a, b) in enumerate(zip(local, external, strict=False)) if a != b), None)
    if same is None:
        return f"has {len(external)} tokens there and {len(local)} here, and does not differ up to the shorter length"
    tree = PrefixTree(prompt + local[:same], ([local[same]], [external[same]]))
    likely, unlikely = players.response_logprobs([tree])
    there, here = (repr(players.tokenizer.decode([ids[same]])) for ids in (external, local))
    cause = "rounding explains that"
    if likely - unlikely >= MAX_ROUNDING_GAP:
        cause = "rounding does not explain that: look for another model, prompt or precision"
    return (
        f"differs at token {same + 1}, {there} there and {here} here, {likely - unlikely:.2g} nats apart under the "
        f"model: {cause}"
    )


def _check_first_step(run: Run, groups: Sequence[PromptGroup]) -> str:
    """Compute the SPIN loss before any training, which is ln 2 if main player and opponent agree."""
    loss_fn = pair_loss(run.recipe.model_copy(update={"objective": Spin()}), 0)
    values = _response_logprobs(run.players.logprobs, groups, run.players.prefix_sharing)
    total = loss_fn(values, groups).loss.item()
    loss = total / sum(len(group.pairs) for group in groups)
    if abs(loss - math.log(2)) > 0.02:
        raise ModelError(
            f"the loss before the first step is {loss:.4f}, not ln 2 = 0.6931: main player and opponent differ before "
            "any training. The model computes differently from one call to the next"
        )
    return f"first step: the loss is {loss:.6f} (ln 2 = 0.693147), so main player and opponent agree"


def _check_4bit(run: Run, groups: Sequence[PromptGroup]) -> str:
    """Compare the 4-bit model with the unquantized one, if there is memory for both."""
    players = run.players
    need = count_parameters(players.model.parameters()) * players.dtype.itemsize
    free = free_bytes(players.device)
    if MEMORY_MARGIN * need > free:
        return (
            f"4 bits: not compared with the unquantized model, which needs {need / 1e9:.1f} GB; {free / 1e9:.1f} GB "
            "are free"
        )
    unquantized = load_model(players.base, players.base_model, players.dtype).to(players.device)
    disable_dropout(unquantized)
    models = (players.logprobs, LogProbs(unquantized))
    quantized, reference = (_per_token(model, groups, players.prefix_sharing) for model in models)
    real = torch.cat([torch.arange(len(group.tree.responses)) == 0 for group in groups])
    difference = (quantized - reference).abs()
    return (
        f"4 bits: log-probabilities differ from the unquantized model's by {difference.mean():.2g} nats per token on "
        f"average, {difference.max():.2g} at most; NLL of real responses {-quantized[real].mean():.3f} nats per token, "
        f"{-reference[real].mean():.3f} unquantized"
    )


def _per_token(logprobs: LogProbs, groups: Sequence[PromptGroup], prefix_sharing: bool) -> torch.Tensor:
    """Log-probability of each response divided by its tokens: [S]."""
    tokens = torch.tensor([len(response) for group in groups for response in group.tree.responses])
    return _response_logprobs(logprobs, groups, prefix_sharing) / tokens


@torch.no_grad()
def _response_logprobs(logprobs: LogProbs, groups: Sequence[PromptGroup], prefix_sharing: bool) -> torch.Tensor:
    """Log-probability of each response, on the CPU: [S]."""
    logprobs.eval()
    device = next(logprobs.parameters()).device
    return torch.cat([logprobs(pack_batch([group.tree], prefix_sharing).to(device)).cpu() for group in groups])


def _check_memory(run: Run, groups: Sequence[PromptGroup]) -> str:
    """Run forward and backward over as many of these groups as a micro-batch holds."""
    players, sharing = run.players, run.players.prefix_sharing
    chosen = micro_batches([group.tree for group in groups], run.recipe.train.tokens_per_micro_batch, sharing)[0]
    part = [groups[index] for index in chosen]
    checkpointing = "on" if set_activation_checkpointing(players.logprobs, run.recipe, sharing) else "off"
    players.logprobs.train()
    began = time.monotonic()
    batch = pack_batch([group.tree for group in part], sharing).to(players.device)
    pair_loss(run.recipe, 0)(players.logprobs(batch), part).loss.backward()
    seconds = time.monotonic() - began
    players.model.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if players.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return (
        f"training: a micro-batch of {batch.input_ids.numel()} tokens took {seconds:.1f} s with gradient checkpointing "
        f"{checkpointing}; peak memory {peak / 1e9:.1f} GB"
    )


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), 100)
