"""π0 and π0.5 as single-device modules in plain torch."""
