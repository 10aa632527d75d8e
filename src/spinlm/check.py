"""Check: try everything a run depends on once, on a few examples, with the run's own code."""

import math
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from spinlm.errors import DataError, ModelError
from spinlm.evals.heldout import real_nll_and_margins
from spinlm.generation import local_engine, open_engine
from spinlm.generation.base import Sampling
from spinlm.model.loading import add_adapter, disable_dropout, load_model
from spinlm.model.logprobs import LogProbs
from spinlm.model.players import Players, seat
from spinlm.model.prefix_trees import PrefixTree, micro_batches, pack_batch
from spinlm.model.quantize import count_parameters
from spinlm.plan import make_plan
from spinlm.recipe.schema import MEMORY_MARGIN, Objective, Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, Generation, read_lines
from spinlm.rundir.stage_graph import START
from spinlm.stages.generate import generate
from spinlm.stages.prepare import prepare
from spinlm.stages.reference_logprobs import score
from spinlm.stages.sft import warmup
from spinlm.training.activation_checkpointing import free_bytes
from spinlm.training.batches import PairItems, pair_objective
from spinlm.training.trainer import Item
from spinlm.utils.atomic import read_json

EXAMPLES = 8
TIE = 0.1  # nats between two tokens that another order of sums may swap
REPEATED = 0.5  # share of identical, or of unfinished, responses from which a warning is due
UNDERTRAINED = 2.0  # so many times the NLL of its own samples: the real responses are foreign to the model
NOISE = 0.05  # share of the margins' size at which a precision is worth a warning


def check(recipe: Recipe) -> Iterator[str]:
    """Try a recipe on a few examples, without warm-up; yields what was found, a line or a paragraph at a time.

    Raises:
        SpinError: with the first thing that is wrong.
    """
    for reason in make_plan(recipe).refusals:
        raise DataError(reason)
    few = {
        "prompts": min(EXAMPLES, recipe.data.prompts or EXAMPLES),
        "heldout": min(EXAMPLES, recipe.data.heldout),
    }
    small = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=few),
            "sft": None,
            "objective": Objective() if recipe.is_control else recipe.objective,
            "report_to": [],
        }
    )
    with tempfile.TemporaryDirectory(prefix="spinlm-check-") as folder:
        run = RunDir(Path(folder))
        began = time.monotonic()
        prepare(small, run)
        players = seat(small, run)
        yield from _about_text(players, run)
        trained = sum(parameter.numel() for _, parameter in players.parameters())
        parameters = list(players.model.parameters())
        in_four_bits = count_parameters(one for one in parameters if hasattr(one, "quant_state"))
        yield (
            f"model: {count_parameters(parameters):,} parameters, {trained:,} of them trained, on {players.device} in "
            f"{players.dtype}{f' and {in_four_bits:,} in 4 bits' if in_four_bits else ''}; "
            f"loaded in {time.monotonic() - began:.0f} s"
        )
        warmup(small, run)
        noted = read_json(run.prefix_sharing)
        yield (
            f"prefix sharing: {'on' if noted['prefix_sharing'] else 'off'}; differences from the model's own log-probabilities: "
            + ", ".join(f"{name} {gap:.1e}" for name, gap in noted["nats_per_token"].items())
            + " nats per token"
        )
        began = time.monotonic()
        generate(small, run, 0)
        generations = list(read_lines(run.generations(0, "train", 0), Generation))
        tokens = sum(len(generation.token_ids) for generation in generations)
        seconds = time.monotonic() - began
        if small.preferences:
            yield f"rejected responses of the data: {tokens} tokens for {len(generations)} prompts, for example:"
        else:
            yield f"opponent: {tokens} tokens for {len(generations)} prompts in {seconds:.1f} s, for example:"
        yield from _about_answers(run, generations)
        yield from _about_engine(small, players, run, generations, noted["prefix_sharing"])
        score(small, run, 0)
        facts = run.metadata("reference_logprobs", 0)["train"]
        if "logprob_mismatch_mean" in facts:
            yield (
                f"scoring: sampler and scorer differ by {facts['logprob_mismatch_mean']:.1e} nats per token on average, "
                f"{facts['logprob_mismatch_max']:.1e} at worst"
            )
        yield (
            f"synthetic responses: {facts['identical_rate']:.0%} equal the real one, {facts['truncated_rate']:.0%} "
            "did not end"
        )
        regime, advice = _about_regime(small, players, run, warm=recipe.sft is None)
        yield regime
        yield from (f"  {one}" for one in advice)
        pairs = PairItems([run.pairs(0, "train", 0)], recipe.train.batch_size)
        items = [pairs[index] for index in range(len(pairs.sizes))]
        if not items:
            yield "every response equals the real one: there is nothing to learn from these prompts"
            return
        yield _about_first_step(small, players, items, noted["prefix_sharing"])
        yield _about_precision(small, players, items, noted["prefix_sharing"])
        if small.model.load_in_4bit:
            yield _about_quantization(small, players, items, noted["prefix_sharing"])
        yield _about_memory(small, players, items, noted["prefix_sharing"])
        if recipe.is_control:
            yield "the sft control was tried as self-play, which takes more memory and time"
        if advice:
            yield "`spinlm run` would run; but first see what is said of the regime, above"
        else:
            yield "ready: nothing stands in the way of `spinlm run`"


def _about_text(players: Players, run: RunDir) -> Iterator[str]:
    example = next(read_lines(run.examples("train"), Example))
    tokenizer = players.tokenizer
    yield f"prompt, as the opponent sees it:\n{_indent(tokenizer.decode(example.prompt_ids))}"
    yield f"real response, as it is trained on:\n{_indent(tokenizer.decode(example.response_ids))}"
    ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in players.renderer.stop_ids)
    yield f"end of turn: {tokenizer.convert_ids_to_tokens(players.renderer.end_id)!r}; a response stops at {ends}"


def _about_engine(
    recipe: Recipe, players: Players, run: RunDir, sampled: list[Generation], prefix_sharing: bool
) -> Iterator[str]:
    """Whether the recipe's engine answers as the local engine does, greedily, and where they first differ."""
    if recipe.opponent.engine == "local" or recipe.preferences:
        return
    examples = list(read_lines(run.examples("train"), Example))
    prompts = [example.prompt_ids for example in examples]
    sampling = Sampling.from_recipe(recipe, players.renderer.stop_ids, temperature=0.0, top_p=1.0, samples=1)
    with open_engine(recipe, players, 0, prefix_sharing) as engine:
        answers = [given[0] for given in engine.generate(prompts, sampling, 0, lambda ended, tokens: None)]
    theirs = [answer.token_ids for answer in answers]
    players.become(START)
    own = local_engine(recipe, players, prefix_sharing)
    ours = [given[0].token_ids for given in own.generate(prompts, sampling, 0, lambda ended, tokens: None)]
    differ = [number for number, (mine, its) in enumerate(zip(ours, theirs, strict=True)) if mine != its]
    name = recipe.opponent.engine
    if not differ:
        yield f"engine: all {len(ours)} greedy answers of the {name} engine are those of the local engine"
    else:
        yield (
            f"engine: {len(ours) - len(differ)} of {len(ours)} greedy answers of the {name} engine are those of the "
            f"local engine; {_first_difference(players, prompts, ours, theirs, differ[0], prefix_sharing)}"
        )
    drawn = {generation.id: generation.token_ids for generation in sampled if generation.sample == 0}
    both = [(drawn[example.id], its) for example, its in zip(examples, theirs, strict=True) if example.id in drawn]
    if recipe.opponent.temperature > 0 and all(one == other for one, other in both):
        yield (
            f"warning: every answer that the {name} engine sampled is its greedy one. Either the model is that sure of "
            "itself, or the server does not sample: does it heed opponent.temperature?"
        )


def _first_difference(
    players: Players,
    prompts: list[list[int]],
    ours: list[list[int]],
    theirs: list[list[int]],
    number: int,
    prefix_sharing: bool,
) -> str:
    """Where two answers part, and how far apart the model finds the two tokens there."""
    mine, its = ours[number], theirs[number]
    same = next((at for at, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), None)
    if same is None:
        return f"answer {number + 1} is {len(its)} tokens long there and {len(mine)} here, as far as that the same"
    tree = PrefixTree(prompts[number] + mine[:same], ([mine[same]], [its[same]]))
    likely, less = players.response_logprobs([tree], prefix_sharing)
    words = [repr(players.tokenizer.decode([ids[same]])) for ids in (its, mine)]
    verdict = (
        "as good as equally likely, so rounding decides"
        if likely - less < TIE
        else "which rounding does not explain: another model, prompt or precision does"
    )
    return (
        f"answer {number + 1} parts at token {same + 1}, {words[0]} there and {words[1]} here, {likely - less:.2g} "
        f"nats apart under the model: {verdict}"
    )


def _about_answers(run: RunDir, generations: list[Generation]) -> Iterator[str]:
    examples = {example.id: example for example in read_lines(run.examples("train"), Example)}
    for generation in generations[:3]:
        example = examples[generation.id]
        yield (
            f"  prompt     {_line(example.messages[-1]['content'])}\n  real       {_line(example.response)}\n"
            f"  synthetic  {_line(generation.text)}"
        )


def _about_regime(recipe: Recipe, players: Players, run: RunDir, *, warm: bool) -> tuple[str, list[str]]:
    """Whether self-play has something to learn from these prompts; and what should come first, if anything."""
    if recipe.preferences:
        return "regime: not looked at, since the data's own pairs are trained on", []
    if not warm:
        return "regime: not looked at, since the warm-up, which this check leaves out, decides it", []
    prefix_sharing, budget = run.metadata("sft", START)["prefix_sharing"], recipe.train.tokens_per_micro_batch
    nll, own, longest = {}, [], 0
    for split in ("train", "heldout"):
        examples = list(read_lines(run.examples(split), Example))
        longest = max(longest, *(len(one.response_ids) for one in examples))
        nll[split] = statistics.fmean(real_nll_and_margins(players, examples, prefix_sharing, budget).nll)
        drawn = list(read_lines(run.generations(0, split, 0), Generation))
        own += [(-one.logprob, len(one.token_ids)) for one in drawn if one.logprob is not None]
    samples = sum(value for value, _ in own) / sum(tokens for _, tokens in own) if own else None
    regime = (
        f"regime: real responses have {nll['train']:.2f} nats per token on prompts of self-play and "
        f"{nll['heldout']:.2f} on held-out ones"
        + ("" if samples is None else f"; the model's own samples {samples:.2f}")
    )
    facts, advice = run.metadata("reference_logprobs", 0)["train"], []
    if facts["identical_rate"] >= REPEATED:
        advice.append(
            f"{facts['identical_rate']:.0%} of the responses repeat the real one: little is left to learn. Take "
            "prompts that the model was not tuned on, or a model tuned for fewer epochs"
        )
    if samples is not None and nll["heldout"] > UNDERTRAINED * samples:
        advice.append(
            "the real responses are much less likely to it than its own: it has not learned this data yet. More "
            "supervised fine-tuning is cheaper than self-play and gains more here; compare with objective={name: sft}"
        )
    if facts["truncated_rate"] >= REPEATED:
        limit = recipe.opponent.max_new_tokens
        advice.append(
            f"{facts['truncated_rate']:.0%} of the model's responses do not end within {limit} tokens. "
            + (
                f"Real ones take up to {longest}: raise opponent.max_new_tokens"
                if longest > limit
                else f"Real ones take at most {longest}, so it has not learned to end: fine-tune on this data first"
            )
        )
    return regime, advice


def _about_first_step(recipe: Recipe, players: Players, items: list[Item], prefix_sharing: bool) -> str:
    players.logprobs.eval()
    objective = pair_objective(recipe.model_copy(update={"objective": Objective()}), 0)
    total = 0.0
    for item in items:
        with torch.no_grad():
            total += objective(
                players.logprobs(pack_batch([item.tree], prefix_sharing).to(players.device)), [item]
            ).loss.item()
    loss = total / sum(len(item.pairs) for item in items)
    gap = abs(loss - math.log(2))
    if gap > 0.02:
        raise ModelError(
            f"the loss before the first step is {loss:.4f}, not ln 2 = 0.6931: main player and opponent differ before "
            "any training. The model computes differently from one call to the next"
        )
    return f"first step: the loss is {loss:.6f} (ln 2 = 0.693147), so main player and opponent agree"


def _about_precision(recipe: Recipe, players: Players, items: list[Item], prefix_sharing: bool) -> str:
    """Margins of a slightly changed player in this precision and in float32."""
    if players.dtype == torch.float32:
        return "precision: float32, nothing to lose"
    if recipe.lora is None:
        return f"precision: {players.dtype}; its margin error is measured for LoRA only"
    exact = load_model(recipe.model, players.path, torch.float32, load_in_4bit=recipe.model.load_in_4bit)
    exact = add_adapter(exact, recipe.lora, recipe.seed).to(players.device)
    disable_dropout(exact)
    reference = LogProbs(exact).eval()
    weights = dict(exact.named_parameters())
    before = _margins(players.logprobs, items, prefix_sharing), _margins(reference, items, prefix_sharing)
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in players.parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
                weights[name].copy_(parameter)
    after = _margins(players.logprobs, items, prefix_sharing), _margins(reference, items, prefix_sharing)
    players.changed()
    players.become(START)
    ours, theirs = after[0] - before[0], after[1] - before[1]
    error, size = (ours - theirs).square().mean().sqrt().item(), theirs.square().mean().sqrt().item()
    advice = ". Consider model.dtype: float32" if error > NOISE * size else ""
    return f"precision: {players.dtype} misjudges margins by {error:.3f} rms, where they are {size:.3f} rms{advice}"


def _about_quantization(recipe: Recipe, players: Players, items: list[Item], prefix_sharing: bool) -> str:
    """How far the model in 4 bits is from itself as it came, which is loaded beside it where there is room."""
    need = count_parameters(players.model.parameters()) * players.dtype.itemsize
    free = free_bytes(players.device)
    if MEMORY_MARGIN * need > free:
        return (
            f"4 bits: not compared with the model as it came, which takes {need / 1e9:.1f} GB, where {free / 1e9:.1f} "
            "GB are free"
        )
    plain = load_model(recipe.model, players.path, players.dtype).to(players.device)
    disable_dropout(plain)
    ours, theirs = (_per_token(model, items, prefix_sharing) for model in (players.logprobs, LogProbs(plain)))
    real = torch.cat([torch.arange(len(item.tree.responses)) == 0 for item in items])
    apart = (ours - theirs).abs()
    return (
        f"4 bits: log-probabilities differ from those of the model as it came by {apart.mean():.2g} nats per token on "
        f"average, {apart.max():.2g} at worst; real responses have {-ours[real].mean():.3f} nats per token, "
        f"{-theirs[real].mean():.3f} without"
    )


@torch.no_grad()
def _per_token(logprobs: LogProbs, items: list[Item], prefix_sharing: bool) -> torch.Tensor:
    """Log-probability of each response divided by its tokens."""
    logprobs.eval()
    device = next(logprobs.parameters()).device
    values = torch.cat([logprobs(pack_batch([item.tree], prefix_sharing).to(device)).cpu() for item in items])
    return values / torch.tensor([len(response) for item in items for response in item.tree.responses])


@torch.no_grad()
def _margins(logprobs: LogProbs, items: list[Item], prefix_sharing: bool) -> torch.Tensor:
    """log p(y) − log p(y') of each pair: [B]."""
    logprobs.eval()
    device = next(logprobs.parameters()).device
    found = []
    for item in items:
        values = logprobs(pack_batch([item.tree], prefix_sharing).to(device)).double().cpu()
        found += [values[real] - values[synthetic] for real, synthetic in item.pairs]
    return torch.stack(found)


def _about_memory(recipe: Recipe, players: Players, items: list[Item], prefix_sharing: bool) -> str:
    """One forward and backward pass over as many of these items as a micro-batch holds."""
    chosen = micro_batches([item.tree for item in items], recipe.train.tokens_per_micro_batch, prefix_sharing)[0]
    part = [items[index] for index in chosen]
    objective = pair_objective(recipe, 0)
    checkpointing = "on" if players.make_room(prefix_sharing) else "off"
    players.logprobs.train()
    began = time.monotonic()
    batch = pack_batch([item.tree for item in part], prefix_sharing).to(players.device)
    objective(players.logprobs(batch), part).loss.backward()
    seconds = time.monotonic() - began
    players.model.zero_grad()
    if players.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = batch.input_ids.numel()
    return (
        f"training: a micro-batch of {tokens} tokens took {seconds:.1f} s with gradient checkpointing {checkpointing}; "
        f"peak memory so far {peak / 1e9:.1f} GB"
    )


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _line(text: str, width: int = 100) -> str:
    folded = " ".join(text.split())
    return folded if len(folded) <= width else folded[: width - 1] + "…"
