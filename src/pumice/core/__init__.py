"""Nouns and small tools that know nothing of the field. Imports nothing else of pumice."""
