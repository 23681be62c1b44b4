"""The command line: one small module per command, heavy imports only inside the commands."""
