"""What is done to a whole model: its layers found, replaced, proven, observed on data, their units put in order."""
