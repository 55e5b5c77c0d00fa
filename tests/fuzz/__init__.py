"""What anybody may send: requests made from the OpenAPI document, and against it."""
