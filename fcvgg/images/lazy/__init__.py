"""Images larger than memory: opened lazily, and read strip by strip."""
