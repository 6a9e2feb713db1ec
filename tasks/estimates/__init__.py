"""What the stages take of a machine, modelled before any run."""
