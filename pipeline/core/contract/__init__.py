"""The data contract: what an application is, and which tables and requests keep it."""
