"""Which policies are in force, for whom, and since which reload."""

from aim_guardrail.in_force.generation import Generation
from aim_guardrail.in_force.policies import Policies
from aim_guardrail.in_force.reload import Reload

__all__ = ["Generation", "Policies", "Reload"]
