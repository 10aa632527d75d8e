"""The recipe's section `objective`. Each objective is a class with its own fields."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from spinlm.recipe.fields import Fraction, ModelOrPath, NonNegative, PerIteration, Positive, Section, subsections

Name = Field(
    description="What training minimizes: `spin`, the SPIN objective; `dpo-positive`, `space` or `t-spin`, which were "
    "designed to be more stable; or a control: `sft`, supervised fine-tuning on the real responses in as many steps, "
    "or `extrapolate`, which `spinlm extrapolate` sets."
)
Link = Annotated[
    Literal["logistic", "hinge", "exponential"], Field(description="Convex decreasing function of the margin.")
]


class _Objective(Section):
    name: str


class _PairObjective(_Objective):
    nll_weight: NonNegative = 0.0
    """Weight of an added term −log p(y|x)/|y|. It keeps the likelihood of the real responses up."""

    @property
    def equal_pairs_carry_gradient(self) -> bool:
        """Whether a pair whose synthetic response equals the real one has a gradient. In r(y) − r(y') it cancels."""
        return False


class _ScaledObjective(_PairObjective):
    beta: PerIteration = 0.1
    """How strongly the main player is held to its opponent: λ in the SPIN paper, α in the T-SPIN paper."""


class LogRatioObjective(_ScaledObjective):
    """An objective of r(y) − r(y'), in which the normalization of the reference cancels. In `Space` it does not."""

    reference_mix: Fraction = 1.0
    """Weight m of the opponent in the reference log p, m·log p_θt + (1 − m)·log p_θ0. Below 1, the player is also held
    to the start θ_0."""


class Spin(LogRatioObjective):
    name: Annotated[Literal["spin"], Name] = "spin"
    link: Link = "logistic"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share ε of pairs whose synthetic response is the better one. β·margin then stops at log((1 − ε)/ε)."""
    length_normalize: bool = False
    """Divide each response's log-probability ratio by its number of tokens, so that long responses weigh no more."""

    @model_validator(mode="after")
    def _check_link(self) -> "Spin":
        if self.label_smoothing and self.link != "logistic":
            raise ValueError(
                f"label_smoothing needs link: logistic, but link is {self.link}. Set link: logistic, or remove "
                "label_smoothing"
            )
        return self


class DpoPositive(LogRatioObjective):
    name: Annotated[Literal["dpo-positive"], Name]
    dpop_lambda: NonNegative = 50.0
    """Weight of the penalty on a real response that has become less likely than under the opponent."""

    @property
    def equal_pairs_carry_gradient(self) -> bool:
        return self.dpop_lambda > 0  # the penalty


class Space(_PairObjective):
    name: Annotated[Literal["space"], Name]
    mu: Positive = 1.0
    """Weight of a synthetic response relative to a real one. `selfplay.replay: 0` is recommended."""

    @property
    def equal_pairs_carry_gradient(self) -> bool:
        return True  # with μ = 1 and r = r(y) = r(y'), the slope 2σ(r) − 1 holds r at 0


class TSpin(_ScaledObjective):
    name: Annotated[Literal["t-spin"], Name]
    link: Link = "logistic"
    history_weight: NonNegative = 1.0
    """Weight of the advantage of the newest synthetic response over θ_0's: β in the T-SPIN paper."""

    @property
    def equal_pairs_carry_gradient(self) -> bool:
        return self.history_weight > 0  # the second term, unless θ_0's response equals them as well


class Control(_Objective):
    name: Annotated[Literal["sft"], Name]


class Extrapolation(Control):
    """θ_0 + factor · (θ − θ_0) instead of training (ExPO, arXiv 2404.16792), with θ from another run of this start."""

    name: Annotated[Literal["extrapolate"], Name]  # type: ignore[assignment]
    run: ModelOrPath
    """The run folder that has θ."""
    iteration: Annotated[int, Field(ge=0)]
    """The iteration that made θ."""
    factor: Annotated[float, Field(allow_inf_nan=False)]
    """How far to go from the start towards θ: 1 ends at θ, more than 1 goes beyond it."""


def _tag(value: Any) -> str:
    name = value.get("name", "spin") if isinstance(value, dict) else getattr(value, "name", "spin")
    return f"<{name}>"


Objective = Annotated[
    Annotated[Spin, Tag("<spin>")]
    | Annotated[DpoPositive, Tag("<dpo-positive>")]
    | Annotated[Space, Tag("<space>")]
    | Annotated[TSpin, Tag("<t-spin>")]
    | Annotated[Control, Tag("<sft>")]
    | Annotated[Extrapolation, Tag("<extrapolate>")],
    Discriminator(_tag),
]

OBJECTIVES: dict[str, type[Section]] = {
    get_args(section.model_fields["name"].annotation)[0]: section for section in subsections(Objective)
}
"""The class of each objective by its name."""
