"""Owns the engine processes of one host, so that they outlive the node agent, and grants route leases to gateways."""
