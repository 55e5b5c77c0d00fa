"""NetworkPolicy decided packet by packet, to compare with."""
