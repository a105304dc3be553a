"""Files and texts that come from anywhere, read in bounded memory and printed safely."""
