"""Image towers for images of any size and aspect ratio (NaFlex), on timm's `naflexvit` models."""

from .inputs import image_grid
from .tower import NaFlexTower

__all__ = ["NaFlexTower", "image_grid"]
