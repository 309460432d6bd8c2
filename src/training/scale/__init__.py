"""Memory per rank and bytes per step of a training run on many ranks. docs/scale.md explains the formulas."""
