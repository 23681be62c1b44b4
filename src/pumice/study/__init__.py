"""Design choices compared: which runs a study needs, running them, and what they show."""
