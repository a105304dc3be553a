"""Let policies act in simulators: processes, episodes, success rates."""
