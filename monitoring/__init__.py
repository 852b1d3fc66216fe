"""Tests, sample by sample, whether what is served is still what was certified. Never loads torch."""
