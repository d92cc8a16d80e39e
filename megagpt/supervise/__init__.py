"""What keeps a run alive that nobody watches, or ends it with the right words."""
