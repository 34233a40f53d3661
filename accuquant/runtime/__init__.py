"""All that a loaded export needs, and nothing of calibration."""
