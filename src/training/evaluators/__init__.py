"""Evaluators: one file each. A new one is a class with the interface of `training.evaluate.Evaluator`, in its list."""
