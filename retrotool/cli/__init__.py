"""Helpers of the command line: options, output, files that commands write."""
