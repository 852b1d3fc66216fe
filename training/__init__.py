"""Trains GANs with Ray Train and writes certified bundles. Imports nothing of serving, monitoring or deploy."""
