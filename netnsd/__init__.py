"""netnsd hands out network namespaces with servers in them, to many users of one host."""

__version__ = "0.1.0"
