"""The HTTP API: who calls, what they may do, and one table of routes."""
