"""open_clip for Ascend."""
