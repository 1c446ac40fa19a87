"""Diffusion models: pipeline verbs, attention processors, and DreamBooth training.

Light on purpose: `import snell_diffusion` reaches this file, so nothing is imported here.
"""
