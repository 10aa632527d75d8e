"""What a run will do and need, estimated in a second: no weights, no network, no torch.

The counts follow from the recipe alone; memory and time also need the model's shape. The plan says where every number
comes from.
"""

from spinlm.plan.estimate import Plan, make_plan
from spinlm.plan.render import render

__all__ = ["Plan", "make_plan", "render"]
