"""Models: which families are known, how they are opened, where their sites are, and the student class."""
