"""`moe-launch plan` and `moe-launch simulate`: what a cluster would do, predicted; no device, no weights."""
