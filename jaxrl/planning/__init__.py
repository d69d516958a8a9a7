"""What a run needs of each device and how much it computes, before anything is allocated."""

from jaxrl.planning.phases import Plan
from jaxrl.planning.phases import plan
from jaxrl.planning.report import text
from jaxrl.planning.target import find

__all__ = ["Plan", "find", "plan", "text"]
