"""GCE and GB-CosFace: thresholds that come from the whole batch."""
