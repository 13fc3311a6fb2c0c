"""One test module for each module of the project, plus the journey and parity; `testkit` holds what they start."""
