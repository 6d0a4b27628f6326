"""The operator: what a cluster is told about services, policies, partitions and fine-tuning jobs, kept so."""
