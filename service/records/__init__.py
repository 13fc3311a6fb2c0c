"""What the service records: decisions and metrics."""
