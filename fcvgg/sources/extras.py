"""`fcvgg.extras` under its older name."""

from fcvgg.extras import imported

__all__ = ["imported"]
