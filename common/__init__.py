"""The plumbing that every algorithm shares: data, experiments, evaluation. Nothing here decides what is learned."""
