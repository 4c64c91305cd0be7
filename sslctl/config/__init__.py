"""The keys of a configuration, the command line that overrides them, and what is said about mistakes."""
