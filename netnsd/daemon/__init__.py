"""The daemon as a process: configuration, systemd, and the one place that joins the rooms."""
