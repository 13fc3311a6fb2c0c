"""The service that answers with the promoted version."""
