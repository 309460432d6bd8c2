"""`python -m open_clip.export`."""

import sys

from .command import main

sys.exit(main())
