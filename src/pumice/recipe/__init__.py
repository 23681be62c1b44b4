"""Recipes: the schema of a whole run, its shipped examples, and `key=value` overrides."""
