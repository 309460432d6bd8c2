"""Seconds of `import open_clip`, over those of `import torch` alone, which the same process does first."""

import json
import os
import time

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
start = time.perf_counter()
import torch  # noqa: E402, F401

middle = time.perf_counter()
import open_clip  # noqa: E402, F401

end = time.perf_counter()
print(json.dumps({"import torch [s]": middle - start, "import open_clip after it [s]": end - middle,
                  "both over torch alone [ratio]": (end - start) / (middle - start)}))  # fmt: skip
