"""The commands that look at what the service decided."""
