"""A classifier's graph: captured, understood, and written again on maps."""
