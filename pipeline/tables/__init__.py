"""Table files, read and written in batches: validation of labelled rows, holdout sides, digests."""
