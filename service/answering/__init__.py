"""From an application to an answer: the served version, its batcher and the follower of the promoted pointer."""
