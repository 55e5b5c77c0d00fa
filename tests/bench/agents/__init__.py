"""Programs that the bench starts as processes of their own, so that they share no interpreter with what it measures."""
