"""Checkpoints: the state of a run, the keys of the file, when it is saved, and which file is the latest."""
