"""The Puzzle method (arXiv 2411.19146): tensors and records in, tensors and records out."""
