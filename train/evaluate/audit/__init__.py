"""Whether instruments see what they are asked for, or what comes with it."""
