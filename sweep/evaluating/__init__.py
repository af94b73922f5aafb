"""One cell: lm-eval's requests, scored with the least work, answered by a pool of servers."""
