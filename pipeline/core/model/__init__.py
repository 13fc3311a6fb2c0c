"""A model: features, verified files, predictions and explanations."""
