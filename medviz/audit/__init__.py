"""What stands beside every synthetic image: its mark, its provenance and the memorisation check."""
