"""`manifests/crds` and `manifests/operator`: made, never written by hand."""
