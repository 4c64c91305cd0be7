from sslctl.cli import command

command()
