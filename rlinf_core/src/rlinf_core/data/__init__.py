"""From rows on disk to batches: reader, transforms, statistics, pipeline and loader."""
