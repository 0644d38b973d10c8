"""What of a prompt can be seen in an image, and where."""
