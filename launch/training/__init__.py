"""The training job's parts: settings, the loop, what it shows, what it does when a loss is not finite."""
