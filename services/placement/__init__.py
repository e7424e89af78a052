"""Placement: admits or rejects deployments, and proposes where their replicas go. It never grants memory."""
