"""What operators see: logs and events."""
