"""The jobs that moe-launch starts on every rank."""
