"""What a run will do and need, worked out before any of it: no weights, no network, no torch.

Counts follow from the recipe alone; memory, disk and time also need the model's shape. Every number is an estimate, and
the plan says what each rests on.
"""

from spinlm.plan.estimate import Plan, make_plan
from spinlm.plan.render import as_data, refusals, render

__all__ = ["Plan", "as_data", "make_plan", "refusals", "render"]
