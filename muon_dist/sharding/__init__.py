"""Who holds which piece of a parameter, and how pieces travel. Knows ranks; knows nothing of Muon."""
