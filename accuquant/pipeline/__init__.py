"""What a pipeline is given: calibration data."""
