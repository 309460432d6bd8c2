"""Training, evaluation and profiling commands."""
