"""The search: choices, limits, bounds, the MIP, baselines, frontier. No torch."""
