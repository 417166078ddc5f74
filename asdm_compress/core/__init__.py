"""What every other room builds on: errors, units, file formats, provenance. Imports no torch."""
