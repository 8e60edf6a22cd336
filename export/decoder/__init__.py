"""Decoders: one graph for a prompt and for the tokens after it, with what a model keeps of earlier tokens as inputs."""
