"""Reporting: tables for the terminal, plots, labelled grids, and the offline report."""
