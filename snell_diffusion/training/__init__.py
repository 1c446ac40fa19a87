"""What every trainer needs: one loop, exact checkpoints, counted randomness, tracking, EMA."""

from snell_diffusion.versions import require

require("torch", "accelerate", "safetensors", "pillow")
