"""Pure arithmetic from manifests, a recipe and a budget to a plan: no torch, no files."""

from streammerge.planner.make import fitted, make_plan, resolve_method

__all__ = ["fitted", "make_plan", "resolve_method"]
