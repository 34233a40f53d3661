"""Feature caches while a model samples."""
