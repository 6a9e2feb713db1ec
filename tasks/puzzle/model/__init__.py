"""The model in torch: blocks of any variant, the whole child, hidden states at block boundaries."""
