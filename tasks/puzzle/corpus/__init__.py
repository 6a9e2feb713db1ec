"""Documents packed to token sequences in splits that share no paragraph. No torch."""
