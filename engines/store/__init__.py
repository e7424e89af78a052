"""Device memory from the host's memory broker: asked for over a Unix socket, mapped at addresses that stay."""
