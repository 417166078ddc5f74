"""Assembly: which edits are possible, what damage they do, which plan is the best, and building the student."""
