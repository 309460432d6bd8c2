"""ImageNet's class names in the order of its labels, and the caption templates of CLIP's zero-shot classifiers.

Both are data of OpenAI's CLIP (MIT licence, see NOTICE), stored in imagenet_zeroshot.json. A template is a function
from a class name to a caption.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

_data = json.loads(Path(__file__).with_name("imagenet_zeroshot.json").read_text(encoding="utf-8"))

IMAGENET_CLASSNAMES: tuple[str, ...] = tuple(_data["classnames"])
OPENAI_IMAGENET_TEMPLATES: tuple[Callable[[str], str], ...] = tuple(text.format for text in _data["openai_templates"])
SIMPLE_IMAGENET_TEMPLATES: tuple[Callable[[str], str], ...] = tuple(text.format for text in _data["simple_templates"])

del _data
