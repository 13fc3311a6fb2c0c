"""One test module for each module of the project, plus the journey and parity."""
