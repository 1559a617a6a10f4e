"""Jobs on Kubernetes: one file per kind of job object; `base` has what they share, `entry` is what a pod runs."""
