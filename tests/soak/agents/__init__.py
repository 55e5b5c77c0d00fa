"""Programs that the soak runs on its hosts, as the users whose clients they are."""
