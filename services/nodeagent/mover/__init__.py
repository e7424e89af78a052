"""Moves engines' memory between GPU and host: one driver for each way, behind one interface (`driver.Driver`)."""
