"""The planner's search: a problem in small numbers, placements in the making, and how good they are."""
