"""How well a network does on labelled images, and what padding and windows do to its scores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
