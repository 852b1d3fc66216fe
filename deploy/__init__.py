"""Puts the parts together on a machine: the command line, the Serve app, Prometheus, Grafana."""
