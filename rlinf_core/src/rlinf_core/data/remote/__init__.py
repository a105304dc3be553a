"""Datasets in object storage: listed once, and downloaded file by file to a cache of bounded size."""
