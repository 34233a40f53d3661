"""A feature cache fitted to a model: its full steps, its forecasts, what corrects them."""
