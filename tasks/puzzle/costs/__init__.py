"""The costs of a variant: parameters, bytes and milliseconds, measured or modelled. No torch."""
