"""The inference job's parts: options, input, the running batch, sampling, how prompts reach ranks, output."""
