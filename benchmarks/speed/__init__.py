"""How fast normalization is: normax, its peers and the machine's own limits, in one process."""
