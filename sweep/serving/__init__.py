"""vLLM servers: how they are started, watched and stopped."""
