"""Answers over HTTP: OpenAI's chat API, its limits and errors, and one page to try a model."""
