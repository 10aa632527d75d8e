"""The plan of a replication: arms, seeds for choosing (dev) and seeds for reporting (test)."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
START = "start"
"""The baseline that every arm starts from."""


@dataclass(frozen=True)
class Arm:
    """A variant of the runs."""

    name: str
    settings: tuple[str, ...] = ()  # changes to the recipe
    start_from: str | None = None  # arm that also gives the responses of iteration 0; absent means the first arm
    only_pairs_of: str | None = None  # fine-tune on the examples that make pairs in this arm
    extrapolate: str | None = None  # arm whose change of the weights is multiplied by `factor`
    factor: float = 1.0

    @classmethod
    def from_yaml(cls, name: str, values: dict[str, Any]) -> "Arm":
        """Return the arm that a plan describes.

        Raises:
            SystemExit: the plan has a key that no arm has.
        """
        values = dict(values)
        if extrapolate := values.pop("extrapolate", None):
            values |= {"extrapolate": extrapolate["of"], "factor": extrapolate["factor"]}
        known = cls.__dataclass_fields__.keys() - {"name"}
        if unknown := values.keys() - known:
            raise SystemExit(f"arm {name}: {min(unknown)} is unknown; an arm has {', '.join(sorted(known))}")
        return cls(name, **values | {"settings": tuple(values.get("settings", ()))})


@dataclass(frozen=True)
class Plan:
    """The runs of a replication: every arm on every seed.

    Settings are chosen on the dev seeds. Then a person writes the chosen arms into `report`, `tuned` and
    `extrapolated`, and only these arms are played and reported on the test seeds.
    """

    title: str
    recipe: Path
    seeds: dict[str, tuple[int, ...]]  # by split: dev and test
    arms: dict[str, Arm]  # the first one makes the start of the others
    metric: str = "task_score"
    settings: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by split: changes to the recipe
    rows: dict[str, int] | None = None  # arguments of recipes/quickstart_data.py; absent means a given or own file
    needs_file: bool = False  # whether --data gives the examples
    also: tuple[str, ...] = ()  # further scorers of greedy responses
    tuned: str | None = None
    extrapolated: str | None = None
    report: tuple[str, ...] = ()
    iterations: dict[str, int] = field(default_factory=dict)  # of arms that the test seeds play for longer

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan.

        Raises:
            SystemExit: the plan has an unknown key, or names an arm that it does not have.
        """
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        data, common = values.pop("data", {}), values.pop("settings", [])
        of_split = {split: (*common, *values.pop(f"{split}_settings", [])) for split in ("dev", "test")}
        known = cls.__dataclass_fields__.keys()
        if unknown := values.keys() - known:
            raise SystemExit(f"{path}: {min(unknown)} is unknown; a plan has {', '.join(sorted(known))}, data")
        plan = cls(
            **values
            | {
                "recipe": HERE.parents[1] / values["recipe"],
                "seeds": {split: tuple(values["seeds"].get(split, ())) for split in ("dev", "test")},
                "arms": {name: Arm.from_yaml(name, arm) for name, arm in values["arms"].items()},
                "settings": of_split,
                "rows": data if isinstance(data, dict) and data else None,
                "needs_file": data == "given",
                "also": tuple(values.get("also", ())),
                "report": tuple(values.get("report") or ()),
                "iterations": dict(values.get("iterations") or {}),
            }
        )
        plan.check(path)
        return plan

    def check(self, path: Path) -> None:
        """Make sure that all arms that the plan names exist, and that no seed is in both splits.

        Raises:
            SystemExit: a mistake, and where it is.
        """
        named = {"tuned": self.tuned, "extrapolated": self.extrapolated} | {
            f"report: {arm}": arm for arm in self.report
        }
        for arm in self.arms.values():
            for key in ("start_from", "only_pairs_of", "extrapolate"):
                named[f"arm {arm.name}: {key}"] = getattr(arm, key)
        for where, name in named.items():
            if name is not None and name not in self.arms and not (name == "tuned" and "extrapolate" in where):
                raise SystemExit(f"{path}: {where}: there is no arm {name}")
        if both := set(self.seeds["dev"]) & set(self.seeds["test"]):
            raise SystemExit(f"{path}: seed {min(both)} is a dev seed and a test seed")

    @property
    def first(self) -> str:
        return next(iter(self.arms))

    def source(self, arm: Arm) -> str | None:
        """Return the arm that this arm extrapolates; None if it extrapolates no arm."""
        return self.tuned if arm.extrapolate == "tuned" else arm.extrapolate

    def reported(self, split: str) -> list[str]:
        """Return the arms in the tables of a split: all on dev; on test those of `report` and the baselines.

        Raises:
            SystemExit: the plan reports nothing on test yet.
        """
        if split == "dev":
            return [name for name, arm in self.arms.items() if self._is_playable(arm)]
        if not self.report or not self.tuned or not self.extrapolated:
            raise SystemExit(
                "the test seeds are for settings chosen on the dev seeds: read the dev table, write the arms into "
                "tuned, extrapolated and report of the plan, and commit it"
            )
        return self._in_order({self.first, self.tuned, self.extrapolated, *self.report})

    def played(self, split: str) -> list[Arm]:
        """Return the arms to play in a split, those that others are made from first."""
        chosen: list[str] = []

        def add(name: str) -> None:
            arm = self.arms[name]
            for other in filter(None, (self.source(arm), arm.only_pairs_of)):
                add(other)
            if name not in chosen:
                chosen.append(name)

        for name in self.reported(split):
            add(name)
        return [self.arms[name] for name in chosen]

    def parents(self, arm: Arm, played: Iterable[Arm]) -> list[str]:
        """Return the arms that must have ended before an arm can be played, the one to start from first."""
        names = {other.name for other in played}
        if arm.extrapolate:
            return [source] if (source := self.source(arm)) else []
        if arm.name == self.first:
            return []
        start = arm.start_from if arm.start_from in names else arm.only_pairs_of or self.first
        return [start, *([arm.only_pairs_of] if arm.only_pairs_of else [])]

    def settings_of(self, split: str, arm: Arm) -> list[str]:
        """Return the changes to the recipe of an arm, without those of the seed."""
        longer = [f"selfplay.iterations={self.iterations[arm.name]}"] if self.plays_longer(split, arm) else []
        return [*self.settings[split], *arm.settings, *longer]

    def plays_longer(self, split: str, arm: Arm) -> bool:
        return split == "test" and arm.name in self.iterations

    def _is_playable(self, arm: Arm) -> bool:
        return not arm.extrapolate or self.source(arm) is not None

    def _in_order(self, names: set[str]) -> list[str]:
        return [name for name in self.arms if name in names]
