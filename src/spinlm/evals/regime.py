"""The regime of a run: whether self-play has something to learn from its data."""

import statistics

from spinlm.evals.heldout import score_heldout
from spinlm.model.run import Run
from spinlm.rundir.records import Example, Generation, read_lines

MAX_RATE = 0.5  # share of identical or truncated responses that calls for advice
MAX_NLL_RATIO = 2.0  # NLL of real responses over the NLL of the model's own samples that calls for advice


def check_regime(run: Run, *, has_sft: bool) -> tuple[str, list[str]]:
    """Compare real and synthetic responses of iteration 0: does self-play have something to learn?

    Args:
        run: a run with reference log-probabilities of iteration 0.
        has_sft: whether the recipe has an SFT that this run left out.

    Returns:
        The finding, and advice if self-play has little to learn.
    """
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
        f"regime: NLL of real responses {nll['train']:.2f} nats per token on self-play prompts, {nll['heldout']:.2f} "
        "on held-out prompts" + ("" if own is None else f"; of the model's own samples {own:.2f}")
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
