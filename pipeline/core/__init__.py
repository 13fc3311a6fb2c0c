"""All that deciding on an application needs; the service imports this package and nothing else of the pipeline."""
