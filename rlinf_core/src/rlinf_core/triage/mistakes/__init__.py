"""Known mistakes: what corrects them, and the search for the correction that makes a site look like training."""
