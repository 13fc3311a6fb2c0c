"""The package command: a Bento and its image."""
