"""The model of the training checkpoint that open_clip_torch 3.3.0 wrote."""

MODEL = {
    "embed_dim": 4,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 4, "head_width": 2, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 2, "heads": 1, "layers": 1},
}
