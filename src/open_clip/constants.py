"""Normalization statistics, file names and sizes of open_clip, OpenAI's CLIP and torchvision."""

OPENAI_DATASET_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_DATASET_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INCEPTION_MEAN = (0.5, 0.5, 0.5)
INCEPTION_STD = (0.5, 0.5, 0.5)

# Files of a model repository on the Hugging Face Hub, or of a local folder with the same layout.
HF_WEIGHTS_NAME = "open_clip_pytorch_model.bin"
HF_SAFE_WEIGHTS_NAME = "open_clip_model.safetensors"
HF_CONFIG_NAME = "open_clip_config.json"
# Files of a repository of the transformers library.
TRANSFORMERS_CONFIG_NAME = "config.json"
TRANSFORMERS_PREPROCESSOR_NAME = "preprocessor_config.json"
TRANSFORMERS_WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")

# Sizes that OpenAI's archives store next to the weights.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")

# Total stride of a ModifiedResNet: image pixels per row of its last stage.
RESNET_STRIDE = 32
