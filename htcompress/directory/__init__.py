"""The output directory, in and out."""
