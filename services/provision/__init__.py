"""What must be there before an installation in containers runs: keys, the NATS server's file, streams, an API key."""
