"""Images as input: read, preprocessed, batched, found in folders, and read lazily."""
