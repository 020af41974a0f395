"""The command line, `arcflow`: one file for each group of commands, `app` puts them together. May import everything."""
