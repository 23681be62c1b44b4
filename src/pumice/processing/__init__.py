"""Between people's data and tensors: the only code that tokenises text or resizes pictures."""
