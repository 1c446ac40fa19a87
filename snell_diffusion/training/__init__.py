"""What every trainer needs: one loop, exact checkpoints, counted randomness, tracking, EMA."""
