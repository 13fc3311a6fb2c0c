"""Judge a model: metrics and figures from labels and probabilities."""
