"""Files that hold trained models, read without running anything in them."""
