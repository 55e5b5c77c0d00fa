"""The soak: thousands of environments made, used and removed while the daemon dies now and then, and what is left."""
