"""Where phrases look in real images, beside what a map earns that never sees the image: `evaluate grounding`."""
