"""Which runtime computes which architecture right, and the model card that says so. No torch."""
