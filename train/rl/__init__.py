"""Aligning a generator with rewards: one rollout, one replay, objectives of a few lines, safeguards."""
