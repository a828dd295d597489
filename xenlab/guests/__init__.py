"""Guest kernels: their sources, built images, and a small library for both."""
