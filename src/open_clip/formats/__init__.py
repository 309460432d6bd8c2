"""Files of weights: their layout, read without running anything that they contain; writing files as a whole."""
