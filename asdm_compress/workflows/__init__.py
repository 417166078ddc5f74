"""Workflows: what a command does from its input to the files that it leaves."""
