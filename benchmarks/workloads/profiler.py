"""Seconds to profile ViT-L-14 and ViT-B-32, imports not counted."""

import json
import time

try:
    from training.profiler import profile_model
except ModuleNotFoundError:
    from open_clip_train.profiler import profile_model

figures = {}
for name in ("ViT-B-32", "ViT-L-14"):
    start = time.perf_counter()
    profile_model(name, profiler="torch")
    figures[f"{name} [s]"] = time.perf_counter() - start
print(json.dumps(figures))
