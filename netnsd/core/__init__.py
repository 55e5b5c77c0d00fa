"""Decisions, and the service that carries them out through the Protocols of ``interfaces``."""
