"""MLflow's side: registered versions, aliases and the logged model."""
