"""Where weights live and how a diffusers pipeline with its adapters is loaded."""
