"""The command line: one small file per command, which imports what it needs when it is called."""
