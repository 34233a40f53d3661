"""Bit widths and cache chosen together under a budget."""
