"""Objects from configurations and from run directories."""
