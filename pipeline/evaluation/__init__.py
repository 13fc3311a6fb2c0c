"""Labels and probabilities become metrics and figures."""
