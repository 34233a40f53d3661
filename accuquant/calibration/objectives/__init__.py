"""Where the gradient of an update comes from."""
