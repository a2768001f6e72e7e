"""What several GPUs do with this engine: benchmarks/cluster_acceptance.sh."""
