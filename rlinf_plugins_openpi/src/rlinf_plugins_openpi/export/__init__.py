"""Exports a policy in the formats of other projects."""
