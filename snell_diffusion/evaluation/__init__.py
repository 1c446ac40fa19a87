"""Measures of personalization and comparisons: `python -m snell_diffusion.evaluation`."""
