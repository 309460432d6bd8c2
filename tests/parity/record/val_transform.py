"""Record what open_clip_torch 3.3.0, on Pillow 13, makes of odd images: the levels that its evaluation transforms give.

    python tests/parity/record val_transform

Images that it fails on (a line of one pixel that is to fit a square) are left out.
"""

from pathlib import Path

import numpy as np

import open_clip
from odd_images import SETTINGS, UNIT, cases, odd_image, to_levels

FIXTURE = Path(__file__).parents[1] / "fixtures" / "val_transform.npz"

if __name__ == "__main__":
    transforms = {
        name: open_clip.image_transform(is_train=False, **UNIT, **settings) for name, settings in SETTINGS.items()
    }
    levels = {}
    for setting, mode, shape in cases():
        try:
            levels["/".join((setting, mode, shape))] = to_levels(transforms[setting](odd_image(mode, shape)))
        except ValueError as error:
            print(setting, mode, shape, error)
    # One array by setting, so that the file is not mostly headers.
    stacked = {setting: np.stack([v for k, v in levels.items() if k.startswith(setting + "/")]) for setting in SETTINGS}
    np.savez_compressed(FIXTURE, names=np.array(list(levels)), **stacked)
