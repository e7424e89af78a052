"""The swapper: decides which parkable replicas are resident and which are parked."""
