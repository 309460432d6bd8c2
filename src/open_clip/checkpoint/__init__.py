"""Checkpoints of any format, loaded into models."""
