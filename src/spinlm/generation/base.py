"""The interface of the generation engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from spinlm.recipe.schema import Recipe

OnProgress = Callable[[int, int], None]
"""`on_progress(responses, tokens)`: responses completed and tokens generated since the last call."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters, the same for all engines."""

    temperature: float  # 0 is greedy
    top_p: float
    max_new_tokens: int
    max_length: int  # of prompt and response together
    samples: int  # per prompt
    stop_ids: tuple[int, ...]  # each ends a response

    @classmethod
    def from_recipe(cls, recipe: Recipe, stop_ids: tuple[int, ...], **overrides: Any) -> "Sampling":
        """Return the parameters of a recipe's opponent. `overrides` replace some of them."""
        opponent = recipe.opponent
        sampling = cls(
            temperature=opponent.temperature,
            top_p=opponent.top_p,
            max_new_tokens=opponent.max_new_tokens,
            max_length=recipe.train.max_length,
            samples=opponent.samples_per_prompt,
            stop_ids=stop_ids,
        )
        return replace(sampling, **overrides)


@dataclass(frozen=True, slots=True)
class Response:
    """A generated response."""

    token_ids: list[int]  # with the end-of-turn token, if the response ends with one
    finished: bool  # ends with an end-of-turn token; False if the token limit cut the response
    logprob: float | None  # sum over tokens as the sampler computed it; None if the engine does not return it


class Engine(Protocol):
    """An engine that holds the current opponent."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, on_progress: OnProgress
    ) -> list[list[Response]]:
        """Generate responses to prompts.

        Args:
            prompts: token ids that the model continues.
            sampling: the sampling parameters.
            seed: the same seed and prompts give the same responses.
            on_progress: called repeatedly.

        Returns:
            For each prompt, in order, `sampling.samples` responses.
        """
        ...
