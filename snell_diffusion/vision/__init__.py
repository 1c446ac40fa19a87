"""Image classification with pretrained vision models: `python -m snell_diffusion.vision`."""
