"""What only a real browser shows; run by hand."""
