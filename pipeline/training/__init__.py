"""The train command: study, folds, workers, streaming and tracking."""
