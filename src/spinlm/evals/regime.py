"""The regime of an iteration in sentences, and advice on whether self-play has something to learn from its data.

Imports no torch, except in `check_regime`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spinlm.model.run import Run
from spinlm.recipe.fields import Section, get_path, value_at
from spinlm.rundir.records import Example, Generation, read_lines

MAX_RATE = 0.5  # share of identical or truncated responses that calls for advice
MAX_NLL_RATIO = 2.0  # NLL of real responses over the NLL of the model's own samples that calls for advice

LINEAR_BETA_MARGIN = 0.3
"""β·margin below which the weights of the pairs have hardly changed: 2σ(−0.3) = 85% of those at the start."""
MAX_BETA_MARGIN = math.log(19)  # where a pair's pull 2σ(−z) is a tenth of that at the start of the iteration
MIN_COSINE = 0.9  # with SFT's expected gradient, from which on the two directions count as the same
MAX_COSINE_ERROR = 0.25  # standard error of the cosine above which it says nothing
PAPER_TOKENS = 25.0  # β times the mean tokens of a real response in the SPIN paper: 0.1 · 250

Values = Mapping[str, Any]
"""The contents of regime.json."""


def link_scale(recipe: Section | Mapping[str, Any], t: int, real_tokens: float) -> float:
    """Return the factor from a margin in nats to the argument of the link function ℓ: β, or β / |y| per token."""
    beta = get_path(recipe, "objective.beta")
    scale = 1.0 if beta is None else value_at(beta, t)
    return scale / real_tokens if get_path(recipe, "objective.length_normalize") else scale


def describe_regime(
    values: Values, recipe: Section | Mapping[str, Any], t: int, margins: Sequence[float] = ()
) -> list[str]:
    """Say in a few sentences which regime an iteration is in.

    Args:
        values: the contents of regime.json.
        recipe: the recipe, or its plain data.
        t: the iteration.
        margins: mean margin of each epoch of training, in nats; empty before training ends.
    """
    if "not_measured" in values:
        return [f"Regime: not measured, because {values['not_measured']}."]
    if not values["pairs"]:
        return [
            f"None of the {values['prompts']} prompts measured has a pair: self-play has nothing to learn from them."
        ]
    sentences = [_direction(values, recipe, t)]
    if (beta := _beta_sentence(values, recipe, t)) is not None:
        sentences.append(beta)
    measured = [values["beta"] * margin for margin in margins]
    return sentences + list(_margin_sentences(values["forecast"], recipe, measured))


def _direction(values: Values, recipe: Section | Mapping[str, Any], t: int) -> str:
    """Compare the expected gradient with that of fine-tuning."""
    cosine, error, prompts = values["cosine_corrected"], values["cosine_corrected_error"], values["prompts"]
    noise, share = values["noise_ratio"], values["synthetic_noise_share"]
    details = "" if share is None else f"; {share:.0%} of a step's squared gradient is noise of the synthetic responses"
    if get_path(recipe, "objective.nll_weight"):
        details += f"; the NLL term has {values['nll_share']:.1%} of the pull on the real responses"
    times = "" if noise is None else f" with {noise:.1f} times the noise"
    if is_fine_tuning(values):
        return f"To first order, this is fine-tuning{times} ({_cosine(values)} after noise is removed{details})."
    if _differs_from_fine_tuning(values):
        return (
            f"The pairs ask for something other than fine-tuning ({_cosine(values)} after noise is removed{details})."
        )
    unclear = "" if cosine is None or error is None else f": {_cosine(values)}"
    if has_fair_samples(recipe, t) and has_fixed_weights(recipe, t):
        return (
            f"To first order, this is fine-tuning{times}, because the responses are fair samples of the opponent "
            f"({prompts} prompts are too few to measure it{unclear}{details})."
        )
    return f"{prompts} prompts are too few to compare the gradient with that of fine-tuning{unclear}{details}."


def _cosine(values: Values) -> str:
    return f"cosine {values['cosine_corrected']:.2f} ± {values['cosine_corrected_error']:.2f}"


def is_fine_tuning(values: Values) -> bool:
    """Return whether the expected gradient was measured to agree with that of fine-tuning."""
    cosine, error = values.get("cosine_corrected"), values.get("cosine_corrected_error")
    return cosine is not None and error is not None and error <= MAX_COSINE_ERROR and cosine >= MIN_COSINE


def _differs_from_fine_tuning(values: Values) -> bool:
    """Return whether the cosine is below that of equal directions by more than two standard errors."""
    cosine, error = values["cosine_corrected"], values["cosine_corrected_error"]
    return cosine is not None and error is not None and cosine < MIN_COSINE and cosine + 2 * error < 1


def has_fair_samples(recipe: Section | Mapping[str, Any], t: int) -> bool:
    """Return whether all synthetic responses of iteration `t` are samples of p_θt, chosen by nothing else."""
    replayed = min(t, get_path(recipe, "selfplay.replay"))
    unchanged = get_path(recipe, "opponent.temperature") == 1 and get_path(recipe, "opponent.top_p") == 1
    return bool(unchanged and not replayed and not get_path(recipe, "opponent.exclude_correct"))


def has_fixed_weights(recipe: Section | Mapping[str, Any], t: int) -> bool:
    """Return whether all pairs have one weight at the start of iteration `t`, independent of the synthetic response."""
    mixes_start = t > 0 and get_path(recipe, "objective.reference_mix") not in (None, 1)
    return (
        get_path(recipe, "objective.name") in ("spin", "space")
        and not get_path(recipe, "objective.length_normalize")
        and not mixes_start
    )


def _beta_sentence(values: Values, recipe: Section | Mapping[str, Any], t: int) -> str | None:
    """Compare β for the length at hand with the paper's; None if they agree within a factor of 3.

    A pair's pull is σ(−β·margin), half of the initial 1/2 at β·margin = ln 3. Spread over the tokens of both responses,
    that is ln 3 / (2 β |y|) nats per token.
    """
    beta, tokens = get_path(recipe, "objective.beta"), values["real_tokens"]
    if beta is None or get_path(recipe, "objective.length_normalize") or not _is_logistic(recipe):
        return None
    beta = value_at(beta, t)
    if 1 / 3 <= beta * tokens / PAPER_TOKENS <= 3:
        return None
    return (
        f"β = {beta:g} on responses of {tokens:.0f} tokens lets a token move by about "
        f"{math.log(3) / (2 * beta * tokens):.2g} nats before a pair pulls half as hard; the paper's 0.1 at 250 tokens "
        f"corresponds to β = {PAPER_TOKENS / tokens:.1g} here."
    )


def _is_logistic(recipe: Section | Mapping[str, Any]) -> bool:
    return get_path(recipe, "objective.link") in (None, "logistic")


def _margin_sentences(
    forecast: Values | None, recipe: Section | Mapping[str, Any], measured: Sequence[float]
) -> Iterator[str]:
    """Say how far β·margin should go and has gone."""
    if measured:
        expected = f" (forecast {_numbers(forecast['beta_margin_by_epoch'])})" if forecast else ""
        yield f"β·margin by epoch: {_numbers(measured)}{expected}."
        if _is_logistic(recipe) and measured[-1] > MAX_BETA_MARGIN:
            yield f"The main player separates the pairs (β·margin {measured[-1]:.1f}): their gradient is nearly 0."
    elif forecast:
        train, heldout = (_with_error(forecast, key) for key in ("beta_margin_train", "beta_margin_heldout"))
        margin, error = forecast["beta_margin_train"], forecast["beta_margin_train_error"]
        limit = ""
        if margin + error < LINEAR_BETA_MARGIN:
            limit = f"; below {LINEAR_BETA_MARGIN}, the pairs keep their initial weights"
        elif _is_logistic(recipe) and margin - error > MAX_BETA_MARGIN:
            limit = f"; above {MAX_BETA_MARGIN:.1f}, the gradient of a pair is nearly 0"
        yield (
            f"Forecast: β·margin {train} on the training pairs when the iteration ends, {heldout} on held-out "
            f"ones{limit}."
        )


def _with_error(forecast: Values, key: str) -> str:
    value, error = forecast[key], forecast[f"{key}_error"]
    unclear = " (too few prompts to tell)" if error > abs(value) else ""
    return f"{value:.2f} ± {error:.2f}{unclear}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def check_regime(run: Run, *, has_sft: bool) -> tuple[str, list[str]]:
    """Compare real and synthetic responses of iteration 0: does self-play have something to learn?

    Args:
        run: a run with reference log-probabilities of iteration 0.
        has_sft: whether the recipe has an SFT that this run left out.

    Returns:
        The finding, and advice if self-play has little to learn.
    """
    from spinlm.evals.heldout import score_heldout  # imports torch

    if run.recipe.preferences:
        return "regime: not checked, since training uses the data's own pairs", []
    if has_sft:
        return "regime: not checked, since this check leaves out the SFT, which decides it", []
    nll, sampled, longest = {}, [], 0
    for split in ("train", "heldout"):
        examples = list(read_lines(run.folder.examples(split), Example))
        longest = max(longest, *(len(example.response_ids) for example in examples))
        nll[split] = statistics.fmean(score_heldout(run.players, examples).nll)
        generations = read_lines(run.folder.generations(0, split, 0), Generation)
        sampled += [(-g.logprob, len(g.token_ids)) for g in generations if g.logprob is not None]
    own = sum(value for value, _ in sampled) / sum(tokens for _, tokens in sampled) if sampled else None
    regime = (
        f"regime (what is left to learn): NLL of real responses {nll['train']:.2f} nats per token on self-play "
        f"prompts, {nll['heldout']:.2f} on held-out prompts"
        + ("" if own is None else f"; of the model's own samples {own:.2f}")
    )
    rates, advice = run.folder.metadata("reference_logprobs", 0)["train"], []
    if rates["identical_rate"] >= MAX_RATE:
        advice.append(
            f"{rates['identical_rate']:.0%} of the responses equal the real one: self-play has little to learn. Use "
            "prompts that the model was not tuned on, or a model that was tuned for fewer epochs"
        )
    if own is not None and nll["heldout"] > MAX_NLL_RATIO * own:
        advice.append(
            "the real responses are much less likely than the model's own: the model has not learned this data yet. "
            "SFT is cheaper than self-play and gains more here; compare with objective={name: sft}"
        )
    if rates["truncated_rate"] >= MAX_RATE:
        limit = run.recipe.opponent.max_new_tokens
        advice.append(
            f"{rates['truncated_rate']:.0%} of the model's responses do not end within {limit} tokens. "
            + (
                f"Real responses have up to {longest} tokens: raise opponent.max_new_tokens"
                if longest > limit
                else f"Real responses have at most {longest} tokens: the model has not learned to end; run SFT first"
            )
        )
    return regime, advice
