"""`make bench`: speed and memory as ratios against a baseline taken in the same run. Nothing is asserted."""
