"""Random sequences of what users ask and of what dies, against a model that knows nothing of how netnsd does it."""
