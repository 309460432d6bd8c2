"""Evaluators: one file each. A new one is a class with the interface `Evaluator` of `training.evaluate`, and an entry
in its list `EVALUATORS`."""
