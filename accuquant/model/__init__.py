"""Modules and diffusers: what turns the mathematics of `accuquant.core` into a model that runs."""
