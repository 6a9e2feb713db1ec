"""Tensors that several stages read: the parent's hidden states at boundaries, and the weights of replacements."""
