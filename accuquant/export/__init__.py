"""Finished folders: written, put in place, loaded."""
