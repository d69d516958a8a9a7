"""What is known of the methods: their configs, what their claims came to, and runs that measure it."""
