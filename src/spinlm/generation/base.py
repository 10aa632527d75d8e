"""What every generation engine offers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from spinlm.rundir.records import Sampling

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Response:
    """One response: token ids (the end-of-turn token included if there was one), whether it ended by itself, and the
    sum of the sampler's own log-probabilities, where the engine tells it."""

    token_ids: list[int]
    finished: bool
    logprob: float | None
    retokenised: bool = False  # the engine gave text, which may have had other tokens


class Engine(Protocol):
    """An engine that holds the current opponent."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, progress: Progress
    ) -> list[list[Response]]:
        """Response prompts given as token ids.

        Args:
            prompts: token ids, each exactly what the model is to continue.
            sampling: how.
            seed: the same seed and prompts give the same answers.
            progress: called now and then with how many answers have ended, and how many tokens been generated, since
                the last call.

        Returns:
            For each prompt, in order, `sampling.samples` answers.
        """
        ...
