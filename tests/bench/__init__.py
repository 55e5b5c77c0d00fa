"""The benchmark behind scripts/bench. No test: what it finds are numbers to look at, not limits to pass or fail."""
