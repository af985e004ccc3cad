"""Post-training compression of recurrent networks in Hierarchical Tucker form."""
