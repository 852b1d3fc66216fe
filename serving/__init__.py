"""Draws samples from bundles and answers requests. Knows of training only its contracts; never loads torch."""
