"""The training command: `python -m training.main`."""

# Before torch: it decides whether and how a device's library (torch_npu) is loaded.
import open_clip.device  # noqa: F401
