"""Export neighbours as files for other tools."""
