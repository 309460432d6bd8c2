"""All architectures that both sides build without a network, on the meta device."""

import json
import logging
import time

import torch

import open_clip

logging.disable(logging.WARNING)  # the models have no weights, as they should

import timm  # noqa: E402, F401  both sides import it for their first image tower of its

started = time.perf_counter()
for name in open_clip.list_models():
    if "naflex" in name or name.startswith("moderntext-"):  # open_clip 3.3.0 has none of them
        continue
    if "hf_model_name" not in open_clip.get_model_config(name)["text_cfg"]:
        with torch.device("meta"):
            open_clip.create_model(name, device="meta", load_weights=False)
print(json.dumps({"134 architectures on meta [s]": time.perf_counter() - started}))
