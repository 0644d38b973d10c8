"""What evidence detectors learn from: counterfactual pairs, real images with what is known of them, and labels."""
