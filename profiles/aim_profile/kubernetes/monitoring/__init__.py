"""What watches a cluster: rules, monitors, dashboards, the exporter's DaemonSet; as files of manifests/monitoring."""
