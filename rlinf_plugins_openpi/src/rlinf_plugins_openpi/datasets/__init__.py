"""Dataset formats for π0 and π0.5: one short file per family, registered in the entry-point group `rlinf.datasets`."""
