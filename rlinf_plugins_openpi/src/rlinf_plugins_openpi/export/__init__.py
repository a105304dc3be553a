"""The policy in other projects' layouts."""
