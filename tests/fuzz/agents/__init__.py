"""What runs on a disposable host, as a user."""
