"""Published models under GRPO on GSM8K, with a mesh and memory settings for each of some machines."""
