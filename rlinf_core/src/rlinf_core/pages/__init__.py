"""What the pages of `rlinf inspect`, `rlinf report` and `rlinf triage` share."""
