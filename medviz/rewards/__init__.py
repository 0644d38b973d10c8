"""What a drawn image is worth: attribute, diagnosis and anatomy rewards, and the held-out judge beside them."""
