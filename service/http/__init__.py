"""The HTTP edge: middleware, limits, API keys and API documents."""
