"""The same decision served in other ways, each as its own documentation shows, all from the promoted version's files."""
