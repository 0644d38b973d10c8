"""From prompts and seeds to latents and images, and from a real image back to its noise."""
