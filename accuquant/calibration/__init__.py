"""A model made ready and tuned."""
