"""Where the words of a prompt looked: attention capture, word heat maps, anatomy and the figures that judge them."""
