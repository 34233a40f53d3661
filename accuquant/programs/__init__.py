"""What the commands do, each from top to bottom."""
