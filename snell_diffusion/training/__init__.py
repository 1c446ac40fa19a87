"""What every trainer needs: one loop, exact checkpoints, counter-based randomness, tracking, EMA."""
