"""Camera augmentations that know no robot and no model."""
