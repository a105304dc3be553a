"""`rlinf inspect`: a page that shows what a run's model will see. Knows no robot and no model."""
