"""`rlinf serve`: the server, what it says about a policy, and the thread that computes."""
