"""The command line client. Imports nothing that it does not use: a listing must feel instant."""
