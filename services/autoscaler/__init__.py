"""The autoscaler: decides how many replicas a deployment has; zero is cold."""
