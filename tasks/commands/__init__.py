"""The work of the commands of `puzzle` behind their arguments; no stage imports this."""
