"""`optimize`: networks for evaluation, as fast as the machine allows."""
