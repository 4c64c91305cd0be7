"""The verbs: sslctl/commands/<verb>.py holds the function of its name; cli.py calls it with the composed configuration."""
