"""Our reinforcement learning beside a public peer, and our methods beside each other: `python -m train bench rl`."""
