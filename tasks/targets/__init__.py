"""A target's constraints as limits of the search, and what was reached of each."""
