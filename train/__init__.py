"""Recipes: the training loop and what it trains. Installed as `retro.train`; `retro` itself never imports it."""
