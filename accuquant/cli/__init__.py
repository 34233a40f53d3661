"""The command line: arguments in, tables and pictures out."""
