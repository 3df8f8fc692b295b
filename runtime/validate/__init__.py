"""Checks of what was compiled against what the model is."""
