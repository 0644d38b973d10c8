"""What leaves the app: marked PNGs, a zip archive of a pair, and stored examples that show without a model."""
