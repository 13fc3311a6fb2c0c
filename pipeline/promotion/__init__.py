"""The commands that change what is promoted: promote, rollback, status and sync."""
