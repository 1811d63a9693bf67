"""Texts to keys: frozen encoders, how their makers want them used, the presets known by name."""
